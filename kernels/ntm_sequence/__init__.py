"""A Neural Turing Machine over a whole sequence."""

from .op import NTMParameters, NTMSequence, ntm_sequence

__all__ = ["NTMParameters", "NTMSequence", "ntm_sequence"]
