"""Stores: what outlives a call and grows. They are neither modules nor buffers (docs/dnd.md)."""

from ._files import StoreError
from ._optimizers import SGD, Adam, RMSProp
from ._table import hash_rows
from .dnd import DND, Stats
from .searchers import HNSW, IVF, Exact, Searcher

__all__ = ["DND", "HNSW", "IVF", "SGD", "Adam", "Exact", "RMSProp", "Searcher", "Stats", "StoreError", "hash_rows"]
