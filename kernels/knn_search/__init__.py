"""Exact nearest neighbours, with distances that can be differentiated."""

from .op import KnnCache, knn_cache, knn_search

__all__ = ["KnnCache", "knn_cache", "knn_search"]
