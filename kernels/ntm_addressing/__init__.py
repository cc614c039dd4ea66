"""The NTM's addressing: content, interpolation, shift and sharpening in one operator."""

from .op import ntm_addressing

__all__ = ["ntm_addressing"]
