"""One whole time step of a Neural Turing Machine's memory."""

from .op import NTMStep, ntm_step

__all__ = ["NTMStep", "ntm_step"]
