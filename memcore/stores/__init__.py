"""Stores: what outlives a call and grows. They are neither modules nor buffers (docs/dnd.md)."""

from ._files import StoreError
from ._optimizers import SGD, Adam, RMSProp
from ._table import hash_rows
from .dnd import DND, Stats

__all__ = ["SGD", "Adam", "DND", "RMSProp", "Stats", "StoreError", "hash_rows"]
