"""The activated pieces of a controller's interface vector."""

from .op import Interface, split_interface

__all__ = ["Interface", "split_interface"]
