"""Least-recently-used access in Triton: the least-used slot of each element, then one pass over the memory.

Backward, with G the gradient of the memory and V that of the weights: dm = G but 0 in the zeroed row, D_h = V_h + G word_h,
dword_h = sum_n w_h G, dprevious_h = gate_h D_h, dgate_h = D_h . (previous_h - onehot).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    launch,
    load_slots,
    load_tile,
    load_vector,
    power,
    sizes,
    store_tile,
    store_vector,
    sum_partials,
    tiles,
    warps,
    workspace,
)

__all__ = ["lrua_write_bwd", "lrua_write_fwd"]


@triton.jit
def least_used_kernel(p_usage, p_least, N, BL: tl.constexpr):
    """The slot of the least usage, the lowest on a tie; NaN counts as most used."""
    NONE: tl.constexpr = 2147483647
    i_b = tl.program_id(0).to(tl.int64)
    best = tl.full([BL], float("inf"), tl.float32)
    at = tl.full([BL], NONE, tl.int32)
    for n0 in range(0, N, BL):
        n = n0 + tl.arange(0, BL)
        u = tl.load(p_usage + i_b * N + n, mask=n < N, other=float("nan")).to(tl.float32)
        better = (u < best) | ((u == u) & (at == NONE))
        best, at = tl.where(better, u, best), tl.where(better, n, at)
    least = tl.min(best, 0)
    found = tl.min(tl.where(best == least, at, NONE), 0)
    tl.store(p_least + i_b, tl.where(found == NONE, 0, found))


@triton.jit
def lrua_write_fwd_kernel(
    p_memory, p_word, p_previous, p_gate, p_least, p_out, p_weights, H, N, W, ZERO: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr
):
    """w = gate previous + (1 - gate) onehot(least); m' = m, that row zeroed, + sum over h of w_h word_h^T, for one tile."""
    T = tl.cdiv(N, BN)
    i = tl.program_id(0)
    i_b, n0 = (i // T).to(tl.int64), (i % T) * BN
    n = n0 + tl.arange(0, BN)
    chosen = n == tl.load(p_least + i_b)
    m = load_tile(p_memory + i_b * N * W, n0, N, W, True, BN, BW)
    if ZERO:
        m = tl.where(chosen[:, None], 0.0, m)
    for h in range(H):
        row = i_b * H + h
        gate = tl.load(p_gate + row).to(tl.float32)
        w = gate * load_slots(p_previous + row * N, n0, N, BN) + (1 - gate) * chosen.to(tl.float32)
        tl.store(p_weights + row * N + n, w.to(p_weights.dtype.element_ty), mask=n < N)
        m += w[:, None] * load_vector(p_word + row * W, W, BW)[None, :]
    store_tile(p_out + i_b * N * W, m, n0, N, W, BN, BW)


@triton.jit
def lrua_write_bwd_kernel(
    p_gmemory, p_gweights, p_word, p_previous, p_gate, p_least, p_dmemory, p_dword, p_dprevious, p_dgate, H, N, W,
    ZERO: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """dm and dprevious of one tile, its shares of dword in [B, T, H, W] and of dgate in [B, T, H]."""
    T = tl.cdiv(N, BN)
    i = tl.program_id(0)
    i_b, n0 = (i // T).to(tl.int64), (i % T) * BN
    n = n0 + tl.arange(0, BN)
    chosen = n == tl.load(p_least + i_b)
    g = tl.zeros([BN, BW], tl.float32)
    if p_gmemory is not None:
        g = load_tile(p_gmemory + i_b * N * W, n0, N, W, True, BN, BW)
    for h in range(H):
        row, part = i_b * H + h, (i_b * T + i % T) * H + h
        gate = tl.load(p_gate + row).to(tl.float32)
        previous = load_slots(p_previous + row * N, n0, N, BN)
        w = gate * previous + (1 - gate) * chosen.to(tl.float32)
        d = tl.sum(g * load_vector(p_word + row * W, W, BW)[None, :], 1)
        if p_gweights is not None:
            d += load_slots(p_gweights + row * N, n0, N, BN)
        tl.store(p_dprevious + row * N + n, (gate * d).to(p_dprevious.dtype.element_ty), mask=n < N)
        store_vector(p_dword + part * W, tl.sum(w[:, None] * g, 0), W, BW)
        tl.store(p_dgate + part, tl.sum(d * (previous - chosen.to(tl.float32)), 0).to(p_dgate.dtype.element_ty))
    if ZERO:
        g = tl.where(chosen[:, None], 0.0, g)
    store_tile(p_dmemory + i_b * N * W, g, n0, N, W, BN, BW)


def _least(usage: Tensor) -> Tensor:
    usage = usage.contiguous()
    B, N = usage.shape
    least = usage.new_empty(B, dtype=torch.int32)
    BL = min(power(N), sizes.row)
    launch(least_used_kernel, B, usage, least, N, num_warps=warps(BL), BL=BL)
    return least


def lrua_write_fwd(
    memory: Tensor, word: Tensor, previous_read: Tensor, usage: Tensor, gate: Tensor, zero: bool
) -> tuple[Tensor, Tensor]:
    """memcore::lrua_write_fwd."""
    memory, word, previous_read, gate = (t.contiguous() for t in (memory, word, previous_read, gate))
    B, N, W = memory.shape
    out, weights = torch.empty_like(memory), torch.empty_like(previous_read)
    BN, BW, T, num_warps = tiles(N, W)
    args = memory, word, previous_read, gate, _least(usage), out, weights, word.shape[1], N, W
    launch(lrua_write_fwd_kernel, B * T, *args, num_warps=num_warps, all_registers=True, ZERO=zero, BN=BN, BW=BW)
    return out, weights


def lrua_write_bwd(
    grad_memory: Tensor | None, grad_weights: Tensor | None,
    memory: Tensor, word: Tensor, previous_read: Tensor, usage: Tensor, gate: Tensor, zero: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """memcore::lrua_write_bwd."""
    grad_memory, grad_weights = (t if t is None else t.contiguous() for t in (grad_memory, grad_weights))
    word, previous_read, gate = word.contiguous(), previous_read.contiguous(), gate.contiguous()
    B, N, W = memory.shape
    H = word.shape[1]
    dmemory = memory.new_empty(memory.shape)
    dword, dprevious, dgate = torch.empty_like(word), torch.empty_like(previous_read), torch.empty_like(gate)
    BN, BW, T, num_warps = tiles(N, W)
    parts = (dword, dgate) if T == 1 else (workspace(memory, B, T, H, W), workspace(memory, B, T, H))
    args = grad_memory, grad_weights, word, previous_read, gate, _least(usage), dmemory, parts[0], dprevious, parts[1], H, N, W
    launch(lrua_write_bwd_kernel, B * T, *args, num_warps=num_warps, all_registers=True, ZERO=zero, BN=BN, BW=BW)
    if T != 1:
        sum_partials(parts[0], dword)
        sum_partials(parts[1], dgate)
    return dmemory, dword, dprevious, dgate
