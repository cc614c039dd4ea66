"""Circular convolution of weights with a shift distribution."""

from .op import circular_shift

__all__ = ["circular_shift"]
