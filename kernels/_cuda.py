"""What a CUDA tensor's operators run on: the native library's kernels or Triton's, chosen at every call by `memcore._backend`.

`memcore::<op>_fwd` and `_bwd` have a chooser at key CUDA. The native kernels stand behind it as `memcore::_<op>_fwd_cuda` and
`_bwd_cuda`, Triton's as functions of kernels/<op>/triton.py, which is imported when it is first used: nothing here touches a driver.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import _backend

__all__ = ["choosers", "implement", "implement_rows", "takes_rows"]

choosers: dict[str, Callable] = {}
"""What is registered at key CUDA, by name: "<op>_fwd", "<op>_bwd", and in-place operators."""
_found: dict[tuple[str, str], Callable] = {}


def _kernel(backend: str, name: str) -> Callable:
    """The function of `backend` with the operator's arguments."""
    try:
        return _found[backend, name]
    except KeyError:
        if backend == "native":
            found = getattr(torch.ops.memcore, f"_{name}_cuda").default
        else:
            found = getattr(import_module(f"memcore.kernels.{_backend.operator(name)}.triton"), name)
        return _found.setdefault((backend, name), found)


def call_of(args: tuple[Any, ...], arguments: list[str]) -> _backend.Call:
    """What the choice depends on: dtype, device and sizes."""
    if "keys" in arguments:
        query, keys = args[arguments.index("query")], args[arguments.index("keys")]
        return _backend.Call(keys.dtype, keys.device, query.shape[-2], *keys.shape[-2:], args[arguments.index("k")])
    memory = arguments.index("memory") if "memory" in arguments else None  # [B, N, W] or [N, W]
    some = next(t for t in args if isinstance(t, Tensor) and t.dim() == 3)
    if memory is None:
        return _backend.Call(some.dtype, some.device, some.shape[0], some.shape[-1], 0)
    N, W = args[memory].shape[-2:]
    return _backend.Call(some.dtype, some.device, some.shape[0], N, W)


def implement(library: torch.library.Library, name: str, inputs: str, returns: str, reference: Callable) -> None:
    """Give `memcore::<name>` its chooser at key CUDA, and the native kernel behind it its schema; `reference` is the last resort."""
    arguments = [part.split()[1] for part in inputs.split(", ")]
    if f"memcore::_{name}_cuda" in _backend.native_gpu_registered:
        library.define(f"_{name}_cuda({inputs}) -> {returns}")

    def choose(*args):
        call = call_of(args, arguments)
        for backend in _backend.gpu_order(name, call):
            if backend == "reference":
                break
            try:
                return _kernel(backend, name)(*args)
            except (ImportError, RuntimeError) as e:
                if not _backend.gives_up(backend, name, call.device, e):
                    raise
        return reference(*args)

    library.impl(name, choose, "CUDA")
    choosers[name] = choose


def implement_rows(library: torch.library.Library, name: str, schema: str) -> None:
    """Give the row-sparse backward `memcore::<name>` its chooser at key CUDA, and the native kernel behind it its schema."""
    arguments = [part.split()[1] for part in schema[1 : schema.index(")")].split(", ")]
    op = name.removesuffix("_rows")
    if f"memcore::_{name}_cuda" in _backend.native_gpu_registered:
        library.define(f"_{name}_cuda{schema}")

    def choose(*args):
        query, keys, indices = (args[arguments.index(a)] for a in ("query", "keys", "indices"))
        call = call_of((query, keys, indices.shape[-1]), ["query", "keys", "k"])
        # The forward was run by one of them, whatever is asked for now.
        order = _backend.rows_order(f"{op}_fwd", call) or _backend.rows_order(f"{op}_fwd", call, "auto")
        for backend in order:
            try:
                return _kernel(backend, name)(*args)
            except (ImportError, RuntimeError) as e:
                if not _backend.gives_up(backend, name, call.device, e):
                    raise
        raise RuntimeError(f"memcore.{op}: no kernel for row-sparse gradients on {call.device}")

    library.impl(name, choose, "CUDA")


def takes_rows(op: str, query: Tensor, keys: Tensor, k: int) -> bool:
    """Whether a search with row-sparse gradients goes to kernels: on CPUs, and where a GPU's take it."""
    if query.device.type == "cpu":
        return True
    call = call_of((query, keys, k), ["query", "keys", "k"])
    return query.device.type == "cuda" and bool(_backend.rows_order(f"{op}_fwd", call))
