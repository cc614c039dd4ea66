"""NEC's read of a dictionary: the values of the nearest keys, weighted by distance."""

from .op import KnnLookup, knn_lookup

__all__ = ["KnnLookup", "knn_lookup"]
