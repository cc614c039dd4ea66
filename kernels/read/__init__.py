"""Weighted reads of a memory."""

from .op import read

__all__ = ["read"]
