"""The plain-PyTorch twin of every operator: readable, differentiable to any order, on any device; no argument checks."""

from .kernels.circular_shift.reference import circular_shift
from .kernels.content_addressing.reference import content_addressing
from .kernels.erase_add_write.reference import erase_add_write, erase_add_write_
from .kernels.interpolate.reference import interpolate
from .kernels.knn_lookup.reference import KnnLookup, knn_lookup
from .kernels.knn_search.reference import knn_search
from .kernels.least_used.reference import least_used
from .kernels.lrua_write.reference import lrua_write
from .kernels.ntm_addressing.reference import ntm_addressing
from .kernels.ntm_sequence.reference import NTMParameters, NTMSequence, ntm_sequence
from .kernels.ntm_step.reference import NTMStep, ntm_step
from .kernels.read.reference import read
from .kernels.sharpen.reference import sharpen
from .kernels.split_interface.reference import Interface, split_interface
from .kernels.usage_update.reference import usage_update

__all__ = [
    "Interface",
    "KnnLookup",
    "NTMParameters",
    "NTMSequence",
    "NTMStep",
    "circular_shift",
    "content_addressing",
    "erase_add_write",
    "erase_add_write_",
    "interpolate",
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
