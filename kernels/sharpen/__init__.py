"""Sharpening of weights by a power."""

from .op import sharpen

__all__ = ["sharpen"]
