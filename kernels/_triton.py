"""What the Triton kernels share: launching, tile sizes, and device functions. Imported by `triton.py` files only.

Storage is float32, bfloat16 or float16; every value is widened to float32 right after its load. Memory is read in tiles [BN, BW] of
whole rows, BW the width rounded up to a power of two. Offsets are 64-bit. Nothing uses atomics: partial sums go to a
workspace and are added in order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Launch", "launch", "launching"]

EPS = tl.constexpr(1e-8)


# Launching ------------------------------------------------------------------------------------------------------------

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything a driver, an ahead-of-time compiler or an emulator needs to know."""

    kernel: Any
    """The jit function."""
    grid: tuple[int]
    arguments: dict[str, Any]
    """By parameter name, in order: tensors, ints, floats, None; constants too."""
    num_warps: int

    def run(self) -> None:
        """On the device of its tensors, on the current stream; no synchronisation."""
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps)

    def source(self, constants: tuple[str, ...] = ()) -> Any:
        """The triton.compiler.ASTSource that compiles as this launch does: sizes of 1 and None are constants, multiples of 16 are marked.

        The compiled kernel takes the arguments that are not "constexpr" in `source().signature`, in order.
        """
        from triton.compiler import ASTSource

        signature, constexprs, attrs = {}, {}, {}
        for i, p in enumerate(self.kernel.params):
            v = self.arguments[p.name]
            if p.is_constexpr or v is None or p.name in constants or (isinstance(v, int) and not isinstance(v, bool) and v == 1):
                signature[p.name], constexprs[(i,)] = "constexpr", v
            elif isinstance(v, Tensor):
                signature[p.name] = _TYPES[v.dtype]
                if v.data_ptr() % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(v, float):
                signature[p.name] = "fp32"
            else:
                signature[p.name] = "i32" if -(2**31) <= v < 2**31 else "i64"
                if v % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs, attrs)


_hook: Callable[[Launch], None] = Launch.run


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, **constants: Any) -> None:
    """Run `kernel` over `programs` blocks; none runs nothing."""
    if programs > 0:
        arguments = dict(zip(kernel.arg_names, args)) | constants
        _hook(Launch(kernel, (programs,), {name: arguments[name] for name in kernel.arg_names}, num_warps))


@contextmanager
def launching(hook: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, `hook` gets every launch instead of the device: for recorders and emulators."""
    global _hook
    previous, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = previous


# Sizes ----------------------------------------------------------------------------------------------------------------


class sizes:
    """Block sizes in elements; tests make them smaller to reach every loop with small tensors."""

    tile = 4096
    """A tile of memory that a loop runs over."""
    whole = 8192
    """A memory that one block keeps in registers over forward and backward."""
    row = 1024
    """A block of slots of weight rows."""
    heads = 4096
    """Sums of several heads over a tile: [heads, BW]."""
    width = 8192
    """The widest slot: a row is one piece."""


def power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def warps(elements: int) -> int:
    """16 elements a thread: with twice as many the backwards spill registers."""
    return min(16, max(1, power(elements) // 512))


def tiles(N: int, W: int) -> tuple[int, int, int, int]:
    """BN, BW, number of tiles and warps for a memory [N, W]."""
    BW = power(W)
    BN = max(1, min(power(N), sizes.tile // BW))
    return BN, BW, triton.cdiv(N, BN), warps(BN * BW)


def rows_block(rows: int, N: int) -> tuple[int, int, int]:
    """BR, BL and warps for `rows` weight rows of N slots: short rows share a block."""
    BL = min(power(N), sizes.row)
    BR = max(1, min(power(rows), sizes.row // BL))
    return BR, BL, warps(BR * BL)


def workspace(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(p, n0, N, W, ok, BN: tl.constexpr, BW: tl.constexpr):
    """Rows n0.. of p [N, W] where `ok` [BN], zero elsewhere: [BN, BW] float32."""
    n, w = n0 + tl.arange(0, BN), tl.arange(0, BW)
    at = n.to(tl.int64)[:, None] * W + w[None, :]
    return tl.load(p + at, mask=(ok & (n < N))[:, None] & (w < W)[None, :], other=0).to(tl.float32)


@triton.jit
def store_tile(p, value, n0, N, W, BN: tl.constexpr, BW: tl.constexpr):
    n, w = n0 + tl.arange(0, BN), tl.arange(0, BW)
    at = n.to(tl.int64)[:, None] * W + w[None, :]
    tl.store(p + at, value.to(p.dtype.element_ty), mask=(n < N)[:, None] & (w < W)[None, :])


@triton.jit
def load_vector(p, W, BW: tl.constexpr):
    """p [W], zero past it: [BW] float32."""
    w = tl.arange(0, BW)
    return tl.load(p + w, mask=w < W, other=0).to(tl.float32)


@triton.jit
def store_vector(p, value, W, BW: tl.constexpr):
    w = tl.arange(0, BW)
    tl.store(p + w, value.to(p.dtype.element_ty), mask=w < W)


@triton.jit
def inverse_norm(norm2):
    """1 / max(|x|, eps), or 0 for a zero vector."""
    return tl.where(norm2 == 0, 0.0, tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(norm2), EPS)))


@triton.jit
def similarity(m, im, k, COSINE: tl.constexpr):
    """Of the rows m [BN, BW] with inverse norms im, and a key [BW]: [BN]. Exactly 0 where a norm is."""
    dot = tl.sum(m * k[None, :], 1)
    if COSINE:
        ik = inverse_norm(tl.sum(k * k, 0))
        dot = tl.where(im == 0, 0.0, tl.where(ik == 0, 0.0, dot * (ik * im)))
    return dot


@triton.jit
def extreme_start(beta):
    return tl.where(beta >= 0, -float("inf"), float("inf"))


@triton.jit
def towards(beta, a, b):
    """Elementwise the greater where beta >= 0, else the lesser; NaN is passed over."""
    return tl.where(beta >= 0, tl.maximum(a, b), tl.minimum(a, b))


@triton.jit
def extreme_of(beta, x):
    """Of the rows of x [BR, BL], for beta [BR]."""
    return tl.where(beta >= 0, tl.max(x, 1), tl.min(x, 1))


@triton.jit
def inverse(total):
    """1 / total of what is summed, with nothing over nothing 0."""
    return 1.0 / tl.where(total == 0, 1.0, total)


@triton.jit
def softmax_stats(p_sim, p_mask, rows, real, batch, beta, N, BR: tl.constexpr, BL: tl.constexpr):
    """The usable extreme and the inverse sum of exp(beta (sim - extreme)) of rows [BR] of p_sim [.., N]; p_mask [B, N] or None."""
    extreme = tl.broadcast_to(extreme_start(beta)[:, None], [BR, BL])
    for n0 in range(0, N, BL):
        n = n0 + tl.arange(0, BL)
        ok = real[:, None] & (n < N)[None, :]
        sim = tl.load(p_sim + rows[:, None] * N + n[None, :], mask=ok, other=0)
        if p_mask is not None:
            ok = ok & tl.load(p_mask + batch[:, None] * N + n[None, :], mask=ok, other=0).to(tl.int1)
        extreme = tl.where(ok, towards(beta[:, None], extreme, sim), extreme)
    extreme = extreme_of(beta, extreme)
    total = tl.zeros([BR, BL], tl.float32)
    for n0 in range(0, N, BL):
        n = n0 + tl.arange(0, BL)
        ok = real[:, None] & (n < N)[None, :]
        sim = tl.load(p_sim + rows[:, None] * N + n[None, :], mask=ok, other=0)
        if p_mask is not None:
            ok = ok & tl.load(p_mask + batch[:, None] * N + n[None, :], mask=ok, other=0).to(tl.int1)
        total += tl.where(ok, tl.exp(beta[:, None] * (sim - extreme[:, None])), 0.0)
    return extreme, inverse(tl.sum(total, 1))


# Sums over tiles ------------------------------------------------------------------------------------------------------


@triton.jit
def sum_partials_kernel(p_part, p_out, T, L, BT: tl.constexpr, BL: tl.constexpr):
    """out[b, l] = sum over t of part[b, t, l], in order."""
    blocks = tl.cdiv(L, BL)
    i = tl.program_id(0).to(tl.int64)
    i_b, l = i // blocks, (i % blocks) * BL + tl.arange(0, BL)
    total = tl.zeros([BT, BL], tl.float32)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        total += tl.load(p_part + (i_b * T + t[:, None]) * L + l[None, :], mask=(t < T)[:, None] & (l < L)[None, :], other=0)
    tl.store(p_out + i_b * L + l, tl.sum(total, 0).to(p_out.dtype.element_ty), mask=l < L)


def sum_partials(part: Tensor, out: Tensor) -> None:
    """part [B, T, ...] summed over T into out [B, ...]."""
    B, T = part.shape[:2]
    L = out[0].numel() if B else 0
    BL = min(power(L), 128)
    launch(sum_partials_kernel, B * triton.cdiv(L, BL), part, out, T, L, num_warps=4, BT=min(power(T), 1024 // BL), BL=BL)
