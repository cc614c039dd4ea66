"""Reads in Triton: sums over tiles of memory; long memories are split over blocks and the parts added in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch, load_slots, load_tile, load_vector, split_heads, store_tile, sum_partials, tiles, workspace

__all__ = ["read_bwd", "read_fwd"]

BLOCKS = 256  # enough for every multiprocessor; a constant, so that a result does not depend on the card


@triton.jit
def read_fwd_kernel(
    p_memory, p_weights, p_out, H, N, W, stride, parts, span, BN: tl.constexpr, BW: tl.constexpr, G: tl.constexpr
):
    """r[h, w] = sum over n of w[h, n] m[n, w] over one part of the slots, G heads at a time (Graves et al. 2014, eq. 2)."""
    i = tl.program_id(0).to(tl.int64)
    i_b, i_p = i // parts, (i % parts).to(tl.int32)
    heads, w = tl.arange(0, G), tl.arange(0, BW)
    for h0 in range(0, H, G):
        total = tl.zeros([G, BW], tl.float32)
        for n0 in range(i_p * span, tl.minimum(N, (i_p + 1) * span), BN):
            m = load_tile(p_memory + i_b * stride, n0, N, W, True, BN, BW)
            for g in range(tl.minimum(G, H - h0)):
                c = load_slots(p_weights + (i_b * H + h0 + g) * N, n0, N, BN)
                total += tl.where((heads == g)[:, None], tl.sum(c[:, None] * m, 0)[None, :], 0.0)
        at = (i * H + h0 + heads[:, None]) * W + w[None, :]
        tl.store(p_out + at, total.to(p_out.dtype.element_ty), mask=(h0 + heads < H)[:, None] & (w < W)[None, :])


@triton.jit
def read_bwd_kernel(p_grad, p_memory, p_weights, p_dmemory, p_dweights, B, H, N, W, stride, BN: tl.constexpr, BW: tl.constexpr):
    """dm = sum over h of w_h dr_h^T, dw = m dr of one tile; a memory shared by the batch (stride 0) sums over it in order."""
    T = tl.cdiv(N, BN)
    i = tl.program_id(0)
    first, n0 = (i // T).to(tl.int64), (i % T) * BN
    last = first + 1
    if stride == 0:
        last = first + B
    n = n0 + tl.arange(0, BN)
    dm = tl.zeros([BN, BW], tl.float32)
    m = load_tile(p_memory + first * stride, n0, N, W, True, BN, BW)
    for i_b in range(first, last):
        for h in range(H):
            row = i_b * H + h
            d = load_vector(p_grad + row * W, W, BW)
            dm += load_slots(p_weights + row * N, n0, N, BN)[:, None] * d[None, :]
            tl.store(p_dweights + row * N + n, tl.sum(m * d[None, :], 1).to(p_dweights.dtype.element_ty), mask=n < N)
    store_tile(p_dmemory + first * N * W, dm, n0, N, W, BN, BW)


def read_fwd(memory: Tensor, weights: Tensor) -> Tensor:
    """memcore::read_fwd."""
    memory, weights = memory.contiguous(), weights.contiguous()
    B, H, N = weights.shape
    W = memory.shape[-1]
    out = memory.new_empty(B, H, W)
    BN, BW, T, num_warps = tiles(N, W)
    span = triton.cdiv(T, max(1, min(T, BLOCKS // max(B, 1)))) * BN  # slots of one part
    parts = max(1, triton.cdiv(N, span)) if N else 1
    to = out if parts == 1 else workspace(memory, B, parts, H, W)
    args = memory, weights, to, H, N, W, N * W if memory.dim() == 3 else 0, parts, span
    launch(read_fwd_kernel, B * parts, *args, num_warps=num_warps, BN=BN, BW=BW, G=split_heads(H, BW))
    if parts > 1:
        sum_partials(to, out)
    return out


def read_bwd(grad: Tensor | None, memory: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """memcore::read_bwd."""
    B, H, N = weights.shape
    W = memory.shape[-1]
    grad = memory.new_zeros(B, H, W) if grad is None else grad
    grad, memory, weights = grad.contiguous(), memory.contiguous(), weights.contiguous()
    dmemory, dweights = torch.empty_like(memory), torch.empty_like(weights)
    BN, BW, T, num_warps = tiles(N, W)
    shared = memory.dim() == 2
    args = grad, memory, weights, dmemory, dweights, B, H, N, W, 0 if shared else N * W
    launch(read_bwd_kernel, (1 if shared else B) * T, *args, num_warps=num_warps, BN=BN, BW=BW)
    return dmemory, dweights
