"""The implementations of the operators that run here, by name."""

import sys
from contextlib import contextmanager

import torch

from memcore import _backend, functional

__all__ = ["PATHS", "standing_in_for_a_gpu", "use_path"]


def _paths() -> list[str]:
    """The reference, and the registered operators: once for each instruction set that runs here, or in Python if not built."""
    if _backend.native is None:
        return ["reference", "registered"]
    if hasattr(torch.ops.memcore, "_cpu_isas"):
        return ["reference", *(f"native-{isa}" for isa in torch.ops.memcore._cpu_isas().split(","))]
    return ["reference", "native"]


PATHS = _paths()


@contextmanager
def use_path(path: str):
    """Run memcore's operators in one of PATHS."""
    kind, _, isa = path.partition("-")
    previous_isa = torch.ops.memcore._set_cpu_isa(isa) if isa else None
    native_cpu, _backend._native_cpu = _backend._native_cpu, frozenset(functional.__all__)
    try:
        with _backend.backend("reference" if kind == "reference" else "native"):
            yield
    finally:
        _backend._native_cpu = native_cpu
        if isa:
            torch.ops.memcore._set_cpu_isa(previous_isa)


@contextmanager
def standing_in_for_a_gpu():
    """For what stands in for a GPU on CPU tensors: searches leave no arguments to the CPU's kernel to judge, and nothing is kept as it keeps it."""
    from memcore.kernels import _op
    from memcore.kernels.knn_lookup import op as lookup
    from memcore.kernels.knn_search import op as search

    plain, kept_from = search.plain, _op.KEPT_FROM
    search.plain = lookup.plain = lambda *_: False
    _op.KEPT_FROM = sys.maxsize
    try:
        yield
    finally:
        search.plain = lookup.plain = plain
        _op.KEPT_FROM = kept_from
