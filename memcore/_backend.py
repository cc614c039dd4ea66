"""Which implementation of an operator runs: the requested backend, what is available, and why not."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from operator import is_
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

__all__ = ["GPU_TABLE", "Call", "backend", "describe", "empty_cache", "gives_up", "gpu_order", "rows_order", "takes_kernel", "takes_native"]

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
    if name.startswith("memcore::") and name.endswith("_fwd") and not name.endswith("_kept_fwd")
)
_told: set[str] = set()


# GPUs -----------------------------------------------------------------------------------------------------------------

_at_cuda = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
native_gpu_registered = frozenset(n for n in _at_cuda if n.startswith("memcore::_") and n.endswith("_cuda"))
_home = Path(__file__).parent
_kernels = next(p for p in (_home / "kernels", _home.parent / "kernels") if p.is_dir())  # beside the package in a checkout
_triton_files = frozenset(p.parent.name for p in _kernels.glob("*/triton.py"))


def _gpu_missing() -> dict[str, str]:
    """Why a GPU backend is not there, empty if it is."""
    if torch.version.hip:
        cuda = "CUDA C++ kernels do not run on AMD GPUs, Triton's do"
    elif native is None:
        cuda = native_missing
    elif not native_gpu_registered:
        cuda = "the native library was built without CUDA kernels; with nvcc: MEMCORE_CUDA=1 pip install --no-build-isolation ."
    else:
        cuda = ""
    return {"native": cuda, "triton": "" if find_spec("triton") else "triton is not installed (pip install triton)"}


_missing = _gpu_missing()
_native_gpu = frozenset(
    n.removeprefix("memcore::_").removesuffix("_fwd_cuda")
    for n in (() if _missing["native"] else native_gpu_registered)
    if n.endswith("_fwd_cuda")
)
_on_gpu = _triton_files | _native_gpu  # operators that have a kernel of either kind
_unusable: dict[tuple[str, int], str] = {}  # (backend, device) -> what its first launch said

BLOCK = 8192  # numbers of a memory that one Triton block holds (kernels/_triton.py, sizes.whole); CUDA's `ntm_step` goes by tiles above it
VAST = 2**24  # numbers of a batch of memories from which a launch takes longer than Python takes to make it
LARGEST = 2_000_000_000  # the kernels' sizes are 32-bit numbers, their offsets 64-bit
MOST = 1024  # neighbours that a block selects (csrc/cuda/knn_search.h; Triton's have the same limit)
WIDEST = 8192  # a Triton tile has whole slots (kernels/_triton.py, sizes.width)
NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What the choice for a GPU tensor depends on. W is 0 for operators on rows of weights alone; K are neighbours, of B queries a dictionary."""

    dtype: torch.dtype
    device: torch.device
    B: int
    N: int
    W: int
    K: int = 0

    @property
    def shape(self) -> str:
        """rows: no memory; block: one block holds an element's memory; tiles: larger ones; vast: those of a large batch."""
        if self.W == 0:
            return "rows"
        if self.N * self.W <= BLOCK:
            return "block"
        return "tiles" if self.B * self.N * self.W < VAST else "vast"


@dataclass(frozen=True)
class Preference:
    operators: tuple[str, ...]
    """Operators, or single directions of one ("read_fwd")."""
    shapes: tuple[str, ...]
    first: str
    reason: str


ROWS = ("interpolate", "circular_shift", "sharpen")
LOOKS = ("content_addressing", "ntm_addressing", "read", "lrua_write")
# The first line that names the operator (or its direction) and the shape holds. Kernel times are of an H200 (results/gpu/h200/kernels.json),
# forward + backward, in microseconds; a launch from Python costs the host about 50 more than one from C++.
GPU_TABLE = (
    Preference(
        ROWS, ("rows",), "native",
        "kernels of like times, and no Python before their launch: circular_shift 81 for Triton's 152 at (B, H, N) = (64, 4, 16384), sharpen 100 for 109, "
        "interpolate 74 for 62",
    ),
    Preference(
        ("ntm_step",), ("block", "tiles", "vast"), "native",
        "by tiles on all multiprocessors where Triton has one block an element: 865 for 1957 a step at (32, 5, 4096, 64); small memories wait for the host, "
        "111 a step for 311 at (16, 2, 128, 20), though Triton's kernels take half the time",
    ),
    Preference(
        ("ntm_sequence",), ("block", "tiles", "vast"), "native",
        "one launch each way for all steps, the element's memory in shared memory throughout; what does not fit a block "
        "(kernels/ntm_sequence/cuda.py) is run step by step by ntm_step and never comes here",
    ),
    Preference(
        ("erase_add_write_fwd", "erase_add_write_"), ("block", "tiles"), "native",
        "one launch over tiles in both and no Python before it: a call takes 41 for Triton's 142 at (64, 4, 512, 64), 83 for 130 at (32, 4, 4096, 64)",
    ),
    Preference(
        (*LOOKS, "erase_add_write_bwd"), ("block",), "native",
        "a call of small kernels waits for the host, and there is no Python before these: content_addressing takes 29 for Triton's 87 at (16, 1, 128, 20), "
        "though its kernels take 21 for 9",
    ),
    Preference(
        (*LOOKS, "erase_add_write"), ("tiles", "vast"), "triton",
        "tiles of a memory go to many blocks, native has one block an element: at (64, 4, 512, 64) content_addressing 49 for 167, read 21 for 121, "
        "ntm_addressing 72 for 170, lrua_write 32 for 222, erase_add_write backward 44 for 283; at (64, 4, 16384, 64) its forward, too, 184 for 615",
    ),
    Preference(
        ("knn_search", "knn_lookup"), ("block", "tiles", "vast"), "native",
        "selects in shared memory, Triton through lists in global memory: 5.1 ms for 10.9 ms of 512 queries among 500,000 keys of 64, 179 for 221 of one",
    ),
)  # fmt: skip


@lru_cache(maxsize=None)
def operator(name: str) -> str:
    """The public name behind <op>_fwd, <op>_bwd, <op>_rows or <op>_."""
    return name.removesuffix("_fwd").removesuffix("_bwd").removesuffix("_rows").removesuffix("_")


@lru_cache(maxsize=None)
def preference(name: str, shape: str) -> Preference | None:
    return next((p for p in GPU_TABLE if shape in p.shapes and (name in p.operators or operator(name) in p.operators)), None)


def _gpu_refusal(backend: str, name: str, call: Call) -> str:
    """Why `backend` cannot take this call, empty if it can."""
    kind = {"native": "CUDA", "triton": "Triton"}[backend]
    if reason := _missing[backend] or _unusable.get((backend, call.device.index or 0), ""):
        return reason
    if operator(name) not in (_native_gpu if backend == "native" else _triton_files):
        return f"there is no {kind} kernel of {operator(name)}"
    if call.dtype not in NARROW:
        return f"{kind} kernels take float32, bfloat16 and float16 tensors, got {str(call.dtype)[6:]}"
    if backend == "triton" and call.W > WIDEST:
        return f"Triton kernels take slots of up to {WIDEST} numbers, got {call.W}"
    if call.K > MOST:
        return f"{kind} kernels find up to {MOST} neighbours, got {call.K}"
    if call.N > LARGEST or call.W > LARGEST:
        return f"{kind} kernels take sizes up to {LARGEST}, got {max(call.N, call.W)}"
    return ""


_orders: dict[tuple[str, str, Call], tuple[str, ...]] = {}
_orders_of: tuple = ()  # what they were made from


def gpu_order(name: str, call: Call) -> tuple[str, ...]:
    """What runs operator `name` ("<op>_fwd", ...) on GPU tensors, the best first; RuntimeError if an explicit choice cannot be met."""
    global _orders_of
    now = (_missing, _unusable, _native_gpu)
    if len(_orders) > 4096 or not all(map(is_, now, _orders_of or (None,) * 3)):
        _orders.clear()
        _orders_of = now
    key = (_requested, name, call)
    found = _orders.get(key)
    if found is None:
        found = _orders[key] = _new_order(name, call)
    return found


def _new_order(name: str, call: Call) -> tuple[str, ...]:
    if _requested in ("native", "triton"):
        if reason := _gpu_refusal(_requested, name, call):
            raise RuntimeError(_refused(_requested, operator(name), call.device.type, reason))
        return (_requested,)
    if _requested == "reference":
        return ("reference",)
    found = preference(name, call.shape)
    order = ("triton", "native") if found is not None and found.first == "triton" else ("native", "triton")
    return (*[b for b in order if not _gpu_refusal(b, name, call)], "reference")


_DEVICE_ERRORS = (  # a build that does not fit this device or driver; nothing has run then
    "no kernel image is available", "unsupported toolchain", "driver version is insufficient", "invalid device function",
)  # fmt: skip


def gives_up(backend: str, name: str, device: torch.device, error: Exception) -> bool:
    """Whether `auto` goes on to the next backend after this error, which is told once; an explicit choice never does."""
    said = str(error)
    _orders.clear()
    if isinstance(error, ImportError) or (backend == "triton" and "C compiler" in said):
        _missing[backend] = f"{backend} does not work here: {said}"
    elif backend == "native" and any(e in said for e in _DEVICE_ERRORS):
        _unusable[backend, device.index or 0] = f"the CUDA kernels do not run on {device}: {said}"
    else:
        return False
    if _requested in ("native", "triton"):
        return False
    _tell_once(f"memcore: operators on {device} go on without {backend} kernels: {said}")
    return True


def _tell_missing_gpu() -> None:
    """Once: which GPU backend is not there, and what runs instead."""
    cuda, triton = _missing["native"], _missing["triton"]
    if cuda and triton:
        _tell_once(f"memcore runs GPU tensors on plain PyTorch: {cuda}; {triton}")
    elif triton:
        _tell_once(f"memcore runs GPU tensors on CUDA C++ kernels alone: {triton}")
    elif cuda and not torch.version.hip:
        _tell_once(f"memcore runs GPU tensors on Triton kernels alone: {cuda}")


# Choosing -------------------------------------------------------------------------------------------------------------


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


def empty_cache() -> int:
    """Give memory that nothing uses back to the system; returns how many bytes it was.

    On Linux, CPU tensors of 1 MiB and more that operators return, and their scratch, come from blocks that are kept when the last reference goes, at most
    MEMCORE_CACHE_MB MiB of them (default 512, or a sixteenth of the memory there is for the process if that is less; 0: malloc's as ever); the longest
    kept leave first. A fresh block would cost the system a page fault and a pass of zeros for every page. Like those of `torch.from_numpy`, such tensors
    cannot be resized to more than they hold.
    """
    return 0 if native is None else torch.ops.memcore._drop_blocks()


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
        elif kind == "cuda" and op in _on_gpu:
            if (_missing["native"] or _missing["triton"]) and not torch.compiler.is_compiling():
                _tell_missing_gpu()
            return (op in _native_gpu and not _missing["native"]) or (op in _triton_files and not _missing["triton"])
        return False
    if _requested == "native" and kind == "cpu" and op in _native_cpu:
        return True
    name = _valid(_requested, "MEMCORE_BACKEND")
    reason = _why_not(name, op, kind)
    if not reason:
        return True
    raise RuntimeError(_refused(name, op, kind, reason))


def rows_order(name: str, call: Call, requested: str = "") -> tuple[str, ...]:
    """Kernels that take this call of operator `name`, which has another way to do the work, the best first."""
    wanted = {"auto": ("native", "triton"), "native": ("native",), "triton": ("triton",)}.get(requested or _requested, ())
    return () if _transformed() else tuple(b for b in wanted if not _gpu_refusal(b, name, call))


def takes_native(name: str, call: Call) -> bool:
    """Whether CUDA's kernel takes this call of operator `name`, which has no other and another way to do the work."""
    return "native" in rows_order(name, call)


def _refused(name: str, op: str, kind: str, reason: str) -> str:
    return f"memcore.{op}: backend {name!r} is not available for {kind} tensors: {reason}"


def _why_not(name: str, op: str, kind: str) -> str:
    """Why a requested backend has nothing for tensors of this kind; empty for GPU tensors that it has a kernel for."""
    if kind == "cuda":
        if _missing[name]:
            return _missing[name]
        if op in (_native_gpu if name == "native" else _triton_files):
            return ""
        return f"there is no {'CUDA' if name == 'native' else 'Triton'} kernel of {op}"
    if name == "triton":
        return "Triton kernels run on GPU tensors"
    if native is None and kind == "cpu":
        return native_missing
    return f"the native library has no kernel of {op} for {kind}"


def describe() -> dict:
    """What runs here and why: requested backend, native library, instruction set, operators with native CPU kernels, GPU backends."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    info = {
        "requested": _valid(_requested, "MEMCORE_BACKEND"),
        "native": native is not None,
        "native_missing": native_missing,
        "operators": sorted(_native_cpu),
        "cpu_isa": None,
        "cpu_isa_available": [],
        "cache": {"bytes": 0, "limit": 0},
        "gpu": {
            "native": {"missing": _missing["native"], "operators": sorted(_native_gpu)},
            "triton": {"missing": _missing["triton"], "operators": sorted(_triton_files), "version": triton},
            "unusable": {f"{b} on cuda:{i}": reason for (b, i), reason in _unusable.items()},
        },
    }
    if native is not None:
        info["cpu_isa"] = torch.ops.memcore._cpu_isa()
        info["cpu_isa_available"] = torch.ops.memcore._cpu_isas().split(",")
        info["cache"] = {"bytes": torch.ops.memcore._kept_blocks(), "limit": torch.ops.memcore._block_limit()}
    return info
