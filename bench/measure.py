"""Measuring: interleaved timing, memory kept for the backward, aten calls, allocator and machine."""

import contextlib
import ctypes
import gc
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _backend

__all__ = [
    "Timing",
    "aten_calls",
    "compiled",
    "exponent",
    "fresh_compiler",
    "held_bytes",
    "interleave",
    "least",
    "machine",
    "products",
    "release",
    "resident",
    "saved_bytes",
    "threads",
    "tune_allocator",
]

SAMPLE_SECONDS = 2e-3  # a sample repeats a call until it takes this long
WARM_SECONDS = 20e-3  # shorter calls are timed after one of their own, as in a loop, not after whatever another variant left in the caches
CONTEXT = "naive"  # shown as context only: timed in every fourth round


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one entry a round."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Linear interpolation between order statistics."""
        ordered = sorted(self.samples)
        at = q * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    variants: Mapping[str, Callable[[], object]], *, wall: bool, seconds: float, least: int = 7, most: int = 60
) -> dict[str, Timing]:
    """Time the variants in turn, round after round in another order, so that whatever else the machine does, and whatever a variant leaves in the
    caches, hits all alike.

    Args:
        variants: name -> a call.
        wall: wall clock (several threads), else CPU seconds of the process (one thread).
        seconds: about how long all rounds may take; `least` and `most` bound their number.
    """
    clock = time.perf_counter if wall else time.process_time
    calls = {}
    for name, call in variants.items():
        call()
        n = 1
        for _ in range(2):  # a rough count, then a better one
            start = time.perf_counter()
            for _ in range(n):
                call()
            each = (time.perf_counter() - start) / n
            n = max(1, math.ceil(SAMPLE_SECONDS / max(each, 1e-7)))
            if n == 1:
                break
        calls[name] = (n, each)
    a_round = sum(n * each * (0.25 if name == CONTEXT else 1) for name, (n, each) in calls.items())
    rounds = max(least, min(most, int(seconds / a_round)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names, order = list(variants), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            order.shuffle(names)
            for name in names:
                if name == CONTEXT and i % 4:
                    continue
                call, n = variants[name], calls[name][0]
                if calls[name][1] < WARM_SECONDS:
                    call()
                start = clock()
                for _ in range(n):
                    call()
                samples[name].append((clock() - start) / n)
    finally:
        gc.enable()
    return {name: Timing(tuple(s)) for name, s in samples.items()}


def saved_bytes(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps alive for the backward of `forward()`: every storage once, those of `exclude` not at all."""
    seen = {t.untyped_storage()._cdata for t in exclude}
    kept: list[Tensor] = []
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        kept.append(t)  # alive until counted, so that no storage's address is used twice
        storage = t.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return total


def products(multiply_adds: float) -> Callable[[], object]:
    """A call of so many float32 multiply-adds as PyTorch's matrix products, of sizes that stay in the caches: how far a kernel is from nothing but
    arithmetic. No bound: a product of ours may be faster."""
    side, block = 512, 1024
    count = max(1, round(multiply_adds / side**2))
    a, b, out = (torch.randn(n, side) for n in (min(block, count), side, min(block, count)))
    parts = [(a[:n], out[:n]) for n in [block] * (count // block) + [count % block] * (count % block > 0)]

    def call() -> None:
        for x, y in parts:
            torch.mm(x, b, out=y)

    return call


LARGE = 4 << 20  # bytes from which on one call of aten more does not count


def least(forward: tuple[int, int], backward: tuple[int, int] | None = None) -> Callable[[], object]:
    """What no operator can do without, to be timed in the rounds of the operator: one call of aten, with autograd's share if there is a backward, or
    else, where tensors are large, what is read, once, and half of what is written, by the plainest calls PyTorch has: its stores read the lines first,
    which those of a kernel that writes past the caches do not.

    Args:
        forward, backward: bytes that they have to read and to write.
    """
    source, sink = (torch.ones(max(n) // 4) for n in zip(forward, backward or forward, strict=True))
    leaf, cotangent = torch.randn(8, requires_grad=True), torch.randn(8)
    plain = leaf.detach()

    def passes(read: int, written: int) -> list[Callable[[], object]]:
        return [source[: read // 4].sum] * (read >= LARGE) + [sink[: written // 8].zero_] * (written >= LARGE)

    calls = passes(*forward)
    if backward:
        calls += [lambda: torch.autograd.grad(leaf.neg(), leaf, cotangent), *passes(*backward)]
    calls = calls or [plain.neg]

    def call() -> None:
        for f in calls:
            f()

    return call


def release() -> None:
    """Give free memory back to the system, which the tuned allocator never does by itself."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # malloc_trim is glibc's
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int | None:
    """Bytes of this process that are in memory and in use; None where /proc does not tell.

    Free memory goes back to the system first: a leak that is fed from blocks freed before would not show.
    """
    release()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def held_bytes(call: Callable[[], object], calls: int, *, blocks: int = 20) -> tuple[Timing, int | None]:
    """CPU seconds a call, and by how many bytes the process has grown after `calls` calls; a tenth of them goes before, uncounted."""
    for _ in range(max(1, calls // 10)):  # pools, caches and lazy imports fill up
        call()
    samples = []
    each = max(1, calls // blocks)
    before = resident()
    for _ in range(max(1, calls // each)):
        start = time.process_time()
        for _ in range(each):
            call()
        samples.append((time.process_time() - start) / each)
    after = resident()
    return Timing(tuple(samples)), None if before is None or after is None else after - before


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of the `size ** p` that fits best: least squares of the logarithms."""
    xs, ys = [math.log(s) for s in sizes], [math.log(v) for v in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def aten_calls(call: Callable[[], object]) -> int:
    """Operators that `call()` sends through the dispatcher, forward, backward and optimizer; a memcore operator is one."""
    with _Calls() as mode:
        call()
    return mode.count


def fresh_compiler() -> None:
    """Forget what torch.compile has made: dynamo gives up after a few shapes of one function."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64


def compiled(function: Callable, try_it: Callable[[Callable], object], *, fullgraph: bool = True) -> tuple[Callable | None, str]:
    """`function` under torch.compile, tried once; (None, why not) where inductor cannot work here."""
    fast = torch.compile(function, dynamic=False, fullgraph=fullgraph)
    try:
        try_it(fast)
    except Exception as e:  # whatever a missing or broken C++ compiler leads to
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        return None, f"torch.compile does not work here: {reason[:200]}"
    return fast, ""


def tune_allocator() -> str:
    """Let malloc keep big blocks instead of mapping and trimming them at each call, for every variant alike; says what it did."""
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        return "THP_MEM_ALLOC_ENABLE=1"
    if not sys.platform.startswith("linux"):
        return "default"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "default"
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    # M_MMAP_THRESHOLD ends at 32 MiB, just below the largest memory: no mapping at all instead.
    done = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_TOP_PAD, 64 << 20)
    return "malloc without mmap and trim" if done else "default"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../kernels", "../memcore", ".", ":!results")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> dict[str, object]:
    """What every row says about where it was measured; a commit with "+" has uncommitted changes."""
    info = _backend.describe()
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "backend": "native" if info["native"] and info["requested"] in ("auto", "native") else "reference",
        "isa": info["cpu_isa"] or "",
        "device": "cpu",
    }
