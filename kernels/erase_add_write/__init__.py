"""Erase/add writes, out of place and in place."""

from .op import erase_add_write, erase_add_write_

__all__ = ["erase_add_write", "erase_add_write_"]
