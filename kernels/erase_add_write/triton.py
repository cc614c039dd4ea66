"""Erase/add writes in Triton: a memory goes through registers once, tile by tile.

Backward, with f_h = 1 - w_h e_h and q_h = g m prod over h' != h of f_h' (never divided, so that a zero factor is harmless):
dm = g prod f, dw_h = sum_w (a_h g - e_h q_h), de_h = -sum_n w_h q_h, da_h = sum_n w_h g.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    added,
    erased,
    launch,
    load_slots,
    load_tile,
    load_vector,
    store_tile,
    store_vector,
    sum_partials,
    tiles,
    wide,
    workspace,
)

__all__ = ["erase_add_write_", "erase_add_write_bwd", "erase_add_write_fwd"]


@triton.jit
def erase_add_write_fwd_kernel(p_memory, p_weights, p_erase, p_add, p_out, H, N, W, BN: tl.constexpr, BW: tl.constexpr):
    """One tile: all erasures, then all additions (Graves et al. 2014, eq. 3-4). p_out may be p_memory."""
    T = tl.cdiv(N, BN)
    i = tl.program_id(0)
    i_b, n0 = (i // T).to(tl.int64), (i % T) * BN
    m = load_tile(p_memory + i_b * N * W, n0, N, W, True, BN, BW)
    m = erased(m, p_weights + i_b * H * N, p_erase + i_b * H * W, n0, H, -1, N, W, BN, BW)
    m = added(m, p_weights + i_b * H * N, p_add + i_b * H * W, n0, H, N, W, BN, BW)
    store_tile(p_out + i_b * N * W, m, n0, N, W, BN, BW)


@triton.jit
def erase_add_write_bwd_kernel(
    p_grad, p_memory, p_weights, p_erase, p_add, p_dmemory, p_dweights, p_derase, p_dadd, H, N, W, BN: tl.constexpr, BW: tl.constexpr
):
    """dm and dw of one tile, and its shares of de and da in [B, T, H, W]."""
    T = tl.cdiv(N, BN)
    i = tl.program_id(0)
    i_b, n0 = (i // T).to(tl.int64), (i % T) * BN
    n = n0 + tl.arange(0, BN)
    m = load_tile(p_memory + i_b * N * W, n0, N, W, True, BN, BW)
    g = load_tile(p_grad + i_b * N * W, n0, N, W, True, BN, BW)
    p_weights, p_erase, p_add = p_weights + i_b * H * N, p_erase + i_b * H * W, p_add + i_b * H * W
    for h in range(H):
        w = load_slots(p_weights + wide(h) * N, n0, N, BN)
        a, e = load_vector(p_add + h * W, W, BW), load_vector(p_erase + h * W, W, BW)
        q = erased(g * m, p_weights, p_erase, n0, H, h, N, W, BN, BW)
        dw = tl.sum(a[None, :] * g - e[None, :] * q, 1)
        tl.store(p_dweights + (i_b * H + h) * N + n, dw.to(p_dweights.dtype.element_ty), mask=n < N)
        at = ((i_b * T + i % T) * H + h) * W
        store_vector(p_derase + at, -tl.sum(w[:, None] * q, 0), W, BW)
        store_vector(p_dadd + at, tl.sum(w[:, None] * g, 0), W, BW)
    store_tile(p_dmemory + i_b * N * W, erased(g, p_weights, p_erase, n0, H, -1, N, W, BN, BW), n0, N, W, BN, BW)


def _write(out: Tensor, memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> None:
    weights, erase, add = weights.contiguous(), erase.contiguous(), add.contiguous()
    B, N, W = memory.shape
    BN, BW, T, num_warps = tiles(N, W)
    args = memory, weights, erase, add, out, weights.shape[1], N, W
    launch(erase_add_write_fwd_kernel, B * T, *args, num_warps=num_warps, BN=BN, BW=BW)


def erase_add_write_fwd(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """memcore::erase_add_write_fwd."""
    memory = memory.contiguous()
    out = torch.empty_like(memory)
    _write(out, memory, weights, erase, add)
    return out


def erase_add_write_(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> None:
    """memcore::erase_add_write_: each block writes the tile it read; a memory with gaps through a copy."""
    if memory.is_contiguous():
        _write(memory, memory, weights, erase, add)
    else:
        memory.copy_(erase_add_write_fwd(memory, weights, erase, add))


def erase_add_write_bwd(
    grad: Tensor | None, memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """memcore::erase_add_write_bwd."""
    grad = torch.zeros_like(memory) if grad is None else grad
    grad, memory, weights, erase, add = (t.contiguous() for t in (grad, memory, weights, erase, add))
    B, N, W = memory.shape
    H = weights.shape[1]
    dmemory, dweights, derase, dadd = (torch.empty_like(t) for t in (memory, weights, erase, add))
    BN, BW, T, num_warps = tiles(N, W)
    parts = (derase, dadd) if T == 1 else (workspace(memory, B, T, H, W), workspace(memory, B, T, H, W))
    args = grad, memory, weights, erase, add, dmemory, dweights, *parts, H, N, W
    launch(erase_add_write_bwd_kernel, B * T, *args, num_warps=num_warps, all_registers=True, BN=BN, BW=BW)
    if T != 1:
        sum_partials(parts[0], derase)
        sum_partials(parts[1], dadd)
    return dmemory, dweights, derase, dadd
