"""The CUDA kernels as operators on CPU tensors, and the shim's switches.

`torch.ops.memcore._<op>_fwd_cuda` and `_bwd_cuda` run csrc/cuda's glue, launchers and kernels once `load()` has been called.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

import torch

from memcore import _backend, functional

import shim_build
from paths import standing_in_for_a_gpu

__all__ = ["LIMIT", "Launch", "kernels", "load", "operators", "processors", "recorded", "schedule", "shared_limit", "use", "watched"]

_RECORDER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
_definitions = torch.library.Library("memcore", "FRAGMENT")


operators = shim_build.operators


def _define(op: str) -> None:
    """Schemas of the internal operators, if the package has none yet."""
    for way in ("fwd", "bwd", *(["rows"] if hasattr(torch.ops.memcore, f"{op}_rows") else [])):
        name = f"_{op}_{way}_cuda"
        if not torch._C._dispatch_has_kernel(f"memcore::{name}") or not hasattr(torch.ops.memcore, name):
            schema = str(getattr(torch.ops.memcore, f"{op}_{way}").default._schema)
            _definitions.define(schema.replace(f"memcore::{op}_{way}", name, 1))


@lru_cache(maxsize=None)
def load() -> ctypes.CDLL:
    for op in operators():
        _define(op)
    path = shim_build.library()
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.mc_shim_name.restype = ctypes.c_char_p
    library.mc_shim_name.argtypes = [ctypes.c_void_p]
    library.mc_shim_shared_limit.argtypes = library.mc_shim_processors.argtypes = [ctypes.c_int64]
    return library


@contextmanager
def schedule(order: str) -> Iterator[None]:
    """Order of threads and blocks: forward, reverse or random:SEED."""
    before = os.environ.get("MC_SHIM_SCHED", "forward")
    os.environ["MC_SHIM_SCHED"] = order
    try:
        yield
    finally:
        os.environ["MC_SHIM_SCHED"] = before


LIMIT = 227 * 1024
PROCESSORS = 132


@contextmanager
def shared_limit(bytes_: int) -> Iterator[None]:
    """A device whose blocks have this much shared memory: little sends memories and scratch to global memory."""
    load().mc_shim_shared_limit(bytes_)
    try:
        yield
    finally:
        load().mc_shim_shared_limit(LIMIT)


@contextmanager
def processors(n: int) -> Iterator[None]:
    """A device of n multiprocessors: on few no block waits for others."""
    load().mc_shim_processors(n)
    try:
        yield
    finally:
        load().mc_shim_processors(PROCESSORS)


@dataclass(frozen=True)
class Launch:
    """What one launch would have been: the kernel's symbol (nvcc's too), geometry, the argument struct byte for byte."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    argument: bytes


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are noted in the list instead of run; the argument holds the CPU tensors' addresses."""
    library, found = load(), []

    def record(kernel, blocks, threads, shared, argument, size):
        found.append(Launch(library.mc_shim_name(kernel).decode(), blocks, threads, shared, ctypes.string_at(argument, size)))

    callback = _RECORDER(record)
    library.mc_shim_record(callback)
    try:
        yield found
    finally:
        library.mc_shim_record(None)


class _Kernels(torch.autograd.Function):
    """One call of the CUDA kernels `fwd` and `bwd`; `again` is the differentiable backward for a second derivative."""

    @staticmethod
    def forward(ctx, op, tensors, *args):
        ctx.op, ctx.rest = op, args[tensors:]
        found, saved = _call(op, "fwd", args), _saved(op)
        ctx.save_for_backward(*(found[-saved:] if saved else ()), *args[:tensors])
        ctx.set_materialize_grads(False)
        return found[:-saved] if saved else found

    @staticmethod
    def backward(ctx, *grads):
        again = torch.is_grad_enabled()
        args = (*grads, *ctx.saved_tensors, *ctx.rest)
        found = getattr(torch.ops.memcore, f"{ctx.op}_bwd").default(*args) if again else _call(ctx.op, "bwd", args)
        found = iter((found,) if isinstance(found, torch.Tensor) else found)
        out = [next(found) if name in _differentiable(ctx.op) else None for name in _tensor_names(ctx.op)]
        tensors = ctx.saved_tensors[_saved(ctx.op) :]
        return None, None, *(g if t is not None else None for g, t in zip(out, tensors)), *(None for _ in ctx.rest)


def kernels(op: str, way: str):
    """The operator `_<op>_fwd_cuda` or `_<op>_bwd_cuda`."""
    return getattr(torch.ops.memcore, f"_{op}_{way}_cuda").default


_watcher = None


def _call(op: str, way: str, args: tuple):
    if _watcher is not None:
        _watcher(op, way, args)
    return kernels(op, way)(*args)


@contextmanager
def watched(watcher: Callable[[str, str, tuple], None]) -> Iterator[None]:
    """Inside, `watcher(op, way, args)` comes before every call of the kernels that `use` makes."""
    global _watcher
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None


@lru_cache(maxsize=None)
def _tensor_names(op: str) -> list[str]:
    schema = getattr(torch.ops.memcore, f"{op}_fwd").default._schema
    return [a.name for a in schema.arguments if "Tensor" in str(a.type)]


@lru_cache(maxsize=None)
def _saved(op: str) -> int:
    """How many of the forward's tensors are for the backward alone."""
    schema = getattr(torch.ops.memcore, f"{op}_bwd").default._schema
    return sum(a.name.startswith("saved_") for a in schema.arguments)


_SEARCH = {"count", "norms", "mirror", "rounding"}


@lru_cache(maxsize=None)
def _differentiable(op: str) -> tuple[str, ...]:
    not_ = {"content_addressing": {"mask"}, "lrua_write": {"usage"}, "ntm_sequence": {"lengths"}, "knn_search": _SEARCH, "knn_lookup": _SEARCH}.get(op, set())
    return tuple(n for n in _tensor_names(op) if n not in not_)


@contextmanager
def use() -> Iterator[None]:
    """Inside, memcore.functional runs the CUDA kernels on CPU tensors; float64, which they lack, keeps the CPU's."""
    load()
    modules = {op: import_module(f"memcore.kernels.{op}.op") for op in operators()}
    native = {op: m._fwd for op, m in modules.items()}

    def call(op):
        tensors = len(_tensor_names(op))

        def fwd(*args):
            if args[0].dtype == torch.float64:
                return native[op](*args)
            return _Kernels.apply(op, tensors, *args)

        return fwd

    known, _backend._native_cpu = _backend._native_cpu, frozenset(functional.__all__)
    try:
        for op, m in modules.items():
            m._fwd = call(op)
        with _backend.backend("native"), standing_in_for_a_gpu():
            yield
    finally:
        _backend._native_cpu = known
        for op, m in modules.items():
            m._fwd = native[op]
