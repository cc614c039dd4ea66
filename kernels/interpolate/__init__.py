"""Interpolation of content weights with the previous step's."""

from .op import interpolate

__all__ = ["interpolate"]
