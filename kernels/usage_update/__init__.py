"""Decayed usage of the slots."""

from .op import usage_update

__all__ = ["usage_update"]
