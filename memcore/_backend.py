"""Which implementation of an operator runs: the requested backend, what is available, and why not."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch.autograd import forward_ad

__all__ = ["backend", "describe", "takes_kernel"]

BACKENDS = ("auto", "reference", "native", "triton")
_log = logging.getLogger("memcore")


def _valid(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"memcore: {source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_requested = os.environ.get("MEMCORE_BACKEND", "auto")  # judged at the first operator, so that importing cannot fail


def _load_native() -> tuple[ModuleType | None, str]:
    """The native library, or why it is missing."""
    try:
        library = import_module("memcore._C")
    except ImportError as e:
        return None, (
            f"memcore's native library is not built or does not load ({e}); build it with: "
            "pip install --no-build-isolation . (in a checkout: python setup.py build_ext --inplace)"
        )
    return library, ""


native, native_missing = _load_native()
# Operators with a native CPU kernel: what the library registered with the dispatcher.
_native_cpu = frozenset(
    name.removeprefix("memcore::").removesuffix("_fwd")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    if name.startswith("memcore::") and name.endswith("_fwd")
)
_told: set[str] = set()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of memcore's operators inside a `with` block, process-wide.

    Args:
        name: "auto" (the best there is for the tensors' device), "reference" (plain PyTorch), "native" (C++ on
            the CPU, CUDA C++ on a GPU) or "triton". MEMCORE_BACKEND sets the default outside any block.

    Raises:
        ValueError: for another name. An operator that cannot meet an explicit choice raises RuntimeError when called.
    """
    global _requested
    previous, _requested = _requested, _valid(name, "backend")
    try:
        yield
    finally:
        _requested = previous


def _transformed() -> bool:
    """Inside torch.func transforms or forward-mode AD, where registered kernels have no rule (private names, kept here)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _tell_once(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        _log.warning(reason)


def takes_kernel(op: str, device: torch.device) -> bool:
    """True to call the registered operator, False to take the reference; RuntimeError if an explicit choice cannot be met."""
    if _requested == "reference" or _transformed():
        return False
    kind = device.type
    if _requested == "auto":
        if kind == "cpu":
            if op in _native_cpu:
                return True
            if native is None and not torch.compiler.is_compiling():
                _tell_once(f"memcore runs on plain PyTorch: {native_missing}")
        return False
    if _requested == "native" and kind == "cpu" and op in _native_cpu:
        return True
    name = _valid(_requested, "MEMCORE_BACKEND")
    raise RuntimeError(f"memcore.{op}: backend {name!r} is not available for {kind} tensors: {_why_not(name, op, kind)}")


def _why_not(name: str, op: str, kind: str) -> str:
    if name == "triton":
        return "no Triton kernel can be chosen in this version"
    if native is None and kind == "cpu":
        return native_missing
    return f"the native library has no kernel of {op} for {kind}"


def describe() -> dict:
    """What runs here and why: requested backend, native library, instruction set, operators with native CPU kernels."""
    info = {
        "requested": _valid(_requested, "MEMCORE_BACKEND"),
        "native": native is not None,
        "native_missing": native_missing,
        "operators": sorted(_native_cpu),
        "cpu_isa": None,
        "cpu_isa_available": [],
    }
    if native is not None:
        info["cpu_isa"] = torch.ops.memcore._cpu_isa()
        info["cpu_isa_available"] = torch.ops.memcore._cpu_isas().split(",")
    return info
