"""The least-used slots."""

from .op import least_used

__all__ = ["least_used"]
