"""Least-recently-used access: MANN's write."""

from .op import lrua_write

__all__ = ["lrua_write"]
