"""memcore's operators: each takes the best implementation for its tensors' device (see `memcore.backend`)."""

from .kernels.circular_shift import circular_shift
from .kernels.content_addressing import content_addressing
from .kernels.erase_add_write import erase_add_write, erase_add_write_
from .kernels.interpolate import interpolate
from .kernels.knn_lookup import KnnLookup, knn_lookup
from .kernels.knn_search import KnnCache, knn_cache, knn_search
from .kernels.least_used import least_used
from .kernels.lrua_write import lrua_write
from .kernels.ntm_addressing import ntm_addressing
from .kernels.ntm_sequence import NTMParameters, NTMSequence, ntm_sequence
from .kernels.ntm_step import NTMStep, ntm_step
from .kernels.read import read
from .kernels.sharpen import sharpen
from .kernels.split_interface import Interface, split_interface
from .kernels.usage_update import usage_update

__all__ = [
    "Interface",
    "KnnCache",
    "KnnLookup",
    "NTMParameters",
    "NTMSequence",
    "NTMStep",
    "circular_shift",
    "content_addressing",
    "erase_add_write",
    "erase_add_write_",
    "interpolate",
    "knn_cache",
    "knn_lookup",
    "knn_search",
    "least_used",
    "lrua_write",
    "ntm_addressing",
    "ntm_sequence",
    "ntm_step",
    "read",
    "sharpen",
    "split_interface",
    "usage_update",
]
