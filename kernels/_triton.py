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
    all_registers: bool = False
    """Let a thread have as many registers as there are: left alone, ptxas spills some to fit one more block on a multiprocessor."""

    def options(self, nvidia: bool = True) -> dict[str, int]:
        """What the compiler is told beside the source."""
        most = {"maxnreg": min(255, 65536 // (32 * self.num_warps))} if self.all_registers and nvidia else {}
        return {"num_warps": self.num_warps, **most}

    def run(self) -> None:
        """On the device of its tensors, on the current stream; no synchronisation."""
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options(torch.version.hip is None))

    def source(self, constants: tuple[str, ...] = ()) -> Any:
        """The triton.compiler.ASTSource that compiles as this launch does: sizes of 1 and None are constants, multiples of 16 are marked.

        The compiled kernel takes the arguments that are not "constexpr" in `source().signature`, in order.
        """
        from triton.compiler import ASTSource

        signature, constexprs, attrs = {}, {}, {}
        for i, p in enumerate(self.kernel.params):
            v = self.arguments[p.name]
            one = isinstance(v, int) and not isinstance(v, bool) and v == 1 and not p.do_not_specialize
            if p.is_constexpr or v is None or p.name in constants or one:
                signature[p.name], constexprs[(i,)] = "constexpr", v
            elif isinstance(v, Tensor):
                signature[p.name] = _TYPES[v.dtype]
                if v.data_ptr() % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(v, float):
                signature[p.name] = "fp32"
            else:
                signature[p.name] = "i32" if -(2**31) <= v < 2**31 else "i64"
                if v % 16 == 0 and not p.do_not_specialize:
                    attrs[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs, attrs)


_hook: Callable[[Launch], None] = Launch.run


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, all_registers: bool = False, **constants: Any) -> None:
    """Run `kernel` over `programs` blocks; none runs nothing."""
    if programs > 0:
        arguments = dict(zip(kernel.arg_names, args)) | constants
        _hook(Launch(kernel, (programs,), {name: arguments[name] for name in kernel.arg_names}, num_warps, all_registers))


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
    kept = 32768
    """A memory that ntm_step's forward keeps in registers, as several tiles that it fills."""
    row = 1024
    """A block of slots of weight rows."""
    heads = 4096
    """Sums of several heads over a tile: [heads, BW]."""
    width = 8192
    """The widest slot: a row is one piece."""
    search = 256
    """Queries times rows that a scan compares at a time."""
    slack = 32
    """Candidates that a search keeps beyond its K, at least."""


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


# A row's way from similarities to weights -----------------------------------------------------------------------------
#
# Rows [BR] of [.., N] go through the stages whose pointers are there: softmax (p_beta: p_in holds similarities),
# interpolation (p_prev, p_gate), circular shift (p_shift), sharpening (p_gamma). Parameters are [rows] and [rows, S].


@triton.jit
def parameter(p, rows, real):
    return tl.load(p + rows, mask=real, other=0).to(tl.float32)


@triton.jit
def turn(k, N):
    """k mod N for k of any sign."""
    return (k % N + N) % N


@triton.jit
def around(n, r, N):
    """(n + r) mod N for 0 <= n, r < N."""
    return tl.where(n + r >= N, n + r - N, n + r)


@triton.jit
def blended(p_in, p_prev, p_beta, rows, i, ok, N, beta, extreme, share, gate):
    """Interpolated content weights at slots i [BL]: [BR, BL], zero where not ok."""
    at = rows[:, None] * N + i[None, :]
    x = tl.load(p_in + at, mask=ok, other=0).to(tl.float32)
    if p_beta is not None:
        x = tl.exp(beta[:, None] * (x - extreme[:, None])) * share[:, None]
    if p_prev is not None:
        x = gate[:, None] * x + (1 - gate[:, None]) * tl.load(p_prev + at, mask=ok, other=0).to(tl.float32)
    return tl.where(ok, x, 0.0)


@triton.jit
def shifted(p_in, p_prev, p_beta, p_shift, rows, real, n, N, S, beta, extreme, share, gate, BR: tl.constexpr, BL: tl.constexpr):
    """sum over j of shift[j] * blended[(n - j + R) mod N]: [BR, BL]."""
    ok = real[:, None] & (n < N)[None, :]
    if p_shift is None:
        return blended(p_in, p_prev, p_beta, rows, n, ok, N, beta, extreme, share, gate)
    else:
        total = tl.zeros([BR, BL], tl.float32)
        for j in range(S):
            s = tl.load(p_shift + rows * S + j, mask=real, other=0).to(tl.float32)
            i = around(n, turn(S // 2 - j, N), N)
            total += s[:, None] * blended(p_in, p_prev, p_beta, rows, i, ok, N, beta, extreme, share, gate)
        return total


@triton.jit
def log_ratio(v, extreme):
    """log(v / extreme), exactly 0 at the extreme; of positive v."""
    return tl.where(v == extreme, 0.0, tl.log(v / extreme))


@triton.jit
def powers(v, gamma, extreme):
    """(v / extreme)^gamma, 0 where v <= 0: at most 1, NaN stays."""
    x = gamma * log_ratio(v, extreme)
    return tl.where(v <= 0, 0.0, tl.exp(tl.where(x > 0, 0.0, x)))


@triton.jit
def positive_extreme(extreme, gamma, v, ok):
    """Running extreme of positive v, the greatest for gamma >= 0."""
    return tl.where(ok & (v > 0), towards(gamma[:, None], extreme, v), extreme)


@triton.jit
def unsharpened(
    p_in, p_prev, p_beta, p_shift, p_work, rows, real, N, S, beta, extreme, share, gate, gamma, BR: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """The rows before sharpening, into p_work for all of the block (None: p_in holds them); their positive extremes [BR]."""
    top = tl.broadcast_to(extreme_start(gamma)[:, None], [BR, BL])
    for n0 in range(0, N, BL):
        n = n0 + tl.arange(0, BL)
        ok = real[:, None] & (n < N)[None, :]
        v = shifted(p_in, p_prev, p_beta, p_shift, rows, real, n, N, S, beta, extreme, share, gate, BR, BL)
        if p_work is not None:
            tl.store(p_work + rows[:, None] * N + n[None, :], v, mask=ok)
        top = positive_extreme(top, gamma, v, ok)
    if p_work is not None:
        tl.debug_barrier()
    return extreme_of(gamma, top)


@triton.jit
def address(
    p_in, p_prev, p_beta, p_gate, p_shift, p_gamma, p_work, p_out, p_keep, rows, real, N, S, BR: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """Weights into p_out and, in float32, into p_keep (may be None). p_work [.., N] float32: the rows before sharpening."""
    beta, extreme, share = tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32)
    gate = tl.zeros([BR], tl.float32)
    if p_beta is not None:
        beta = parameter(p_beta, rows, real)
        extreme, share = softmax_stats(p_in, None, rows, real, rows, beta, N, BR, BL)
    if p_gate is not None:
        gate = parameter(p_gate, rows, real)
    if p_gamma is None:
        for n0 in range(0, N, BL):
            n = n0 + tl.arange(0, BL)
            v = shifted(p_in, p_prev, p_beta, p_shift, rows, real, n, N, S, beta, extreme, share, gate, BR, BL)
            tl.store(p_out + rows[:, None] * N + n[None, :], v.to(p_out.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])
    else:
        gamma = parameter(p_gamma, rows, real)
        top_r = unsharpened(p_in, p_prev, p_beta, p_shift, p_work, rows, real, N, S, beta, extreme, share, gate, gamma, BR, BL)
        if p_work is not None:
            p_v = p_work
        else:
            p_v = p_in
        total = tl.zeros([BR, BL], tl.float32)
        for n0 in range(0, N, BL):
            n = n0 + tl.arange(0, BL)
            ok = real[:, None] & (n < N)[None, :]
            v = tl.load(p_v + rows[:, None] * N + n[None, :], mask=ok, other=0).to(tl.float32)
            total += powers(v, gamma[:, None], top_r[:, None])
        part = inverse(tl.sum(total, 1))
        for n0 in range(0, N, BL):
            n = n0 + tl.arange(0, BL)
            ok = real[:, None] & (n < N)[None, :]
            v = tl.load(p_v + rows[:, None] * N + n[None, :], mask=ok, other=0).to(tl.float32)
            w = powers(v, gamma[:, None], top_r[:, None]) * part[:, None]
            w = tl.where((gamma != gamma)[:, None], gamma[:, None], w)
            tl.store(p_out + rows[:, None] * N + n[None, :], w.to(p_out.dtype.element_ty), mask=ok)
            if p_keep is not None:
                tl.store(p_keep + rows[:, None] * N + n[None, :], w, mask=ok)


@triton.jit
def address_bwd(
    p_grad, p_in, p_prev, p_beta, p_gate, p_shift, p_gamma, p_work, p_dv, p_du,
    p_din, p_dprev, p_dbeta, p_dgate, p_dshift, p_dgamma, p_own,
    rows, real, N, S, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Backward of `address`: gradients of what is there.

    p_work, p_dv, p_du: [.., N] float32 scratch: rows before sharpening, their gradient, the gradient of the content weights.
    p_din may be p_dv where p_beta is there; p_own [rows] gets sum over n of din * in.
    """
    beta, extreme, share = tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32)
    gate = tl.zeros([BR], tl.float32)
    if p_beta is not None:
        beta = parameter(p_beta, rows, real)
        extreme, share = softmax_stats(p_in, None, rows, real, rows, beta, N, BR, BL)
    if p_gate is not None:
        gate = parameter(p_gate, rows, real)
    if p_gamma is not None:
        gamma = parameter(p_gamma, rows, real)
        top_r = unsharpened(p_in, p_prev, p_beta, p_shift, p_work, rows, real, N, S, beta, extreme, share, gate, gamma, BR, BL)
        if p_work is not None:
            p_v = p_work
        else:
            p_v = p_in
        total = tl.zeros([BR, BL], tl.float32)
        inner = tl.zeros([BR, BL], tl.float32)
        for n0 in range(0, N, BL):
            n = n0 + tl.arange(0, BL)
            ok = real[:, None] & (n < N)[None, :]
            v = tl.load(p_v + rows[:, None] * N + n[None, :], mask=ok, other=0).to(tl.float32)
            g = tl.load(p_grad + rows[:, None] * N + n[None, :], mask=ok, other=0).to(tl.float32)
            e = powers(v, gamma[:, None], top_r[:, None])
            total += e
            inner += e * g
        part = inverse(tl.sum(total, 1))
        mean = tl.sum(inner, 1) * part
        slope = tl.zeros([BR, BL], tl.float32)
        for n0 in range(0, N, BL):
            n = n0 + tl.arange(0, BL)
            ok = real[:, None] & (n < N)[None, :]
            v = tl.load(p_v + rows[:, None] * N + n[None, :], mask=ok, other=0).to(tl.float32)
            g = tl.load(p_grad + rows[:, None] * N + n[None, :], mask=ok, other=0).to(tl.float32)
            w = powers(v, gamma[:, None], top_r[:, None]) * part[:, None]
            t = tl.where(w == 0, 0.0, w * (g - mean[:, None]))
            slope += tl.where(t == 0, 0.0, t * log_ratio(v, top_r[:, None]))
            dv = tl.where(t == 0, 0.0, gamma[:, None] * t / v)
            tl.store(p_dv + rows[:, None] * N + n[None, :], dv.to(p_dv.dtype.element_ty), mask=ok)
        tl.store(p_dgamma + rows, tl.sum(slope, 1).to(p_dgamma.dtype.element_ty), mask=real)
        tl.debug_barrier()
        p_d = p_dv
    else:
        p_d = p_grad
    if p_shift is not None:
        for j in range(S):
            total = tl.zeros([BR, BL], tl.float32)
            r = turn(S // 2 - j, N)
            for n0 in range(0, N, BL):
                n = n0 + tl.arange(0, BL)
                ok = real[:, None] & (n < N)[None, :]
                d = tl.load(p_d + rows[:, None] * N + n[None, :], mask=ok, other=0).to(tl.float32)
                total += d * blended(p_in, p_prev, p_beta, rows, around(n, r, N), ok, N, beta, extreme, share, gate)
            tl.store(p_dshift + rows * S + j, tl.sum(total, 1).to(p_dshift.dtype.element_ty), mask=real)
    if (p_shift is not None) or (p_gate is not None):
        towards_gate = tl.zeros([BR, BL], tl.float32)
        inner = tl.zeros([BR, BL], tl.float32)
        for n0 in range(0, N, BL):
            n = n0 + tl.arange(0, BL)
            ok = real[:, None] & (n < N)[None, :]
            at = rows[:, None] * N + n[None, :]
            if p_shift is None:
                du = tl.load(p_d + at, mask=ok, other=0).to(tl.float32)
            else:
                du = tl.zeros([BR, BL], tl.float32)
                for j in range(S):
                    s = tl.load(p_shift + rows * S + j, mask=real, other=0).to(tl.float32)
                    i = around(n, turn(j - S // 2, N), N)
                    du += s[:, None] * tl.load(p_d + rows[:, None] * N + i[None, :], mask=ok, other=0).to(tl.float32)
            if p_gate is not None:
                c = blended(p_in, None, p_beta, rows, n, ok, N, beta, extreme, share, gate)
                towards_gate += du * (c - tl.load(p_prev + at, mask=ok, other=0).to(tl.float32))
                tl.store(p_dprev + at, ((1 - gate[:, None]) * du).to(p_dprev.dtype.element_ty), mask=ok)
                du = gate[:, None] * du
                inner += c * du
            if p_beta is not None:
                tl.store(p_du + at, du, mask=ok)
            else:
                tl.store(p_din + at, du.to(p_din.dtype.element_ty), mask=ok)
        if p_gate is not None:
            tl.store(p_dgate + rows, tl.sum(towards_gate, 1).to(p_dgate.dtype.element_ty), mask=real)
        if p_beta is not None:
            tl.debug_barrier()
            mean = tl.sum(inner, 1)
            slope = tl.zeros([BR, BL], tl.float32)
            own = tl.zeros([BR, BL], tl.float32)
            for n0 in range(0, N, BL):
                n = n0 + tl.arange(0, BL)
                ok = real[:, None] & (n < N)[None, :]
                at = rows[:, None] * N + n[None, :]
                s = tl.load(p_in + at, mask=ok, other=0)
                c = blended(p_in, None, p_beta, rows, n, ok, N, beta, extreme, share, gate)
                t = tl.where(c == 0, 0.0, c * (tl.load(p_du + at, mask=ok, other=0) - mean[:, None]))
                slope += tl.where(t == 0, 0.0, t * (s - extreme[:, None]))
                d = tl.where(t == 0, 0.0, t * beta[:, None])
                own += tl.where(d == 0, 0.0, d * s)
                tl.store(p_din + at, d, mask=ok)
            tl.store(p_dbeta + rows, tl.sum(slope, 1).to(p_dbeta.dtype.element_ty), mask=real)
            tl.store(p_own + rows, tl.sum(own, 1), mask=real)


@triton.jit
def address_kernel(
    p_in, p_prev, p_beta, p_gate, p_shift, p_gamma, p_work, p_out, N, S, count, BR: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """The stages that are there, for `count` rows of N slots."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    address(p_in, p_prev, p_beta, p_gate, p_shift, p_gamma, p_work, p_out, None, rows, rows < count, N, S, BR, BL)


@triton.jit
def address_bwd_kernel(
    p_grad, p_in, p_prev, p_beta, p_gate, p_shift, p_gamma, p_work, p_dv, p_du,
    p_din, p_dprev, p_dbeta, p_dgate, p_dshift, p_dgamma, p_own,
    N, S, count, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Their backward."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    address_bwd(
        p_grad, p_in, p_prev, p_beta, p_gate, p_shift, p_gamma, p_work, p_dv, p_du,
        p_din, p_dprev, p_dbeta, p_dgate, p_dshift, p_dgamma, p_own,
        rows, rows < count, N, S, BR, BL,
    )  # fmt: skip


# Sums over slots and writes -------------------------------------------------------------------------------------------


@triton.jit
def wide(i):
    """A loop counter as a 64-bit offset."""
    return tl.zeros([], tl.int64) + i


@triton.jit
def load_slots(p, n0, N, BN: tl.constexpr):
    """p [N] from slot n0 on, zero past the end: [BN] float32."""
    n = n0 + tl.arange(0, BN)
    return tl.load(p + n, mask=n < N, other=0).to(tl.float32)


@triton.jit
def erased(m, p_weights, p_erase, n0, H, skip, N, W, BN: tl.constexpr, BW: tl.constexpr):
    """m * product over heads (but `skip`; -1 skips none) of 1 - w_h e_h^T; p_weights [H, N], p_erase [H, W]."""
    for h in range(H):
        if h != skip:
            w = load_slots(p_weights + wide(h) * N, n0, N, BN)
            m *= 1 - w[:, None] * load_vector(p_erase + h * W, W, BW)[None, :]
    return m


@triton.jit
def added(m, p_weights, p_words, n0, H, N, W, BN: tl.constexpr, BW: tl.constexpr):
    """m + sum over heads of w_h word_h^T."""
    for h in range(H):
        m += load_slots(p_weights + wide(h) * N, n0, N, BN)[:, None] * load_vector(p_words + h * W, W, BW)[None, :]
    return m


def split_heads(H: int, BW: int) -> int:
    """Heads whose sums [heads, BW] a block keeps at once, a power of two."""
    return min(power(H), max(1, sizes.heads // BW))
