"""Content addressing in Triton: one launch for memories that a block holds, else similarities by tiles, then rows of weights.

Backward, with s_n = k.m_n ik im_n, w = softmax(beta s), g the gradient of w:
t = w (g - g.w), dbeta = t.s, ds = beta t, c_n = ds_n ik im_n;
dk = sum_n c_n m_n - (ds.s) ik^2 k, dm_n = sum_h c_n k - (sum_h ds_n s_n) im_n^2 m_n. Norms below eps are constants.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    EPS,
    inverse,
    inverse_norm,
    launch,
    load_tile,
    load_vector,
    power,
    rows_block,
    similarity,
    sizes,
    softmax_stats,
    store_tile,
    store_vector,
    tiles,
    warps,
    workspace,
)

__all__ = ["content_addressing_bwd", "content_addressing_fwd"]


@triton.jit
def usable_slots(p_mask, i_b, n0, N, BN: tl.constexpr):
    """[BN] bool: inside the memory and not masked."""
    n = n0 + tl.arange(0, BN)
    ok = n < N
    if p_mask is not None:
        ok = ok & tl.load(p_mask + i_b * N + n, mask=ok, other=0).to(tl.int1)
    return ok


@triton.jit
def any_usable(p_mask, i_b, N, BLOCK: tl.constexpr):
    """Whether batch element i_b has a slot to address."""
    found = tl.zeros([BLOCK], tl.int32)
    for n0 in range(0, N, BLOCK):
        found = tl.maximum(found, usable_slots(p_mask, i_b, n0, N, BLOCK).to(tl.int32))
    return tl.max(found, 0) > 0


@triton.jit
def load_key(p_key, row, W, usable, BW: tl.constexpr):
    """Key [BW]; zero where nothing is usable, whatever it holds."""
    w = tl.arange(0, BW)
    return tl.load(p_key + row * W + w, mask=w < tl.where(usable, W, 0), other=0).to(tl.float32)


@triton.jit
def content_addressing_fwd_kernel(
    p_key, p_memory, p_strength, p_mask, p_out, H, N, W, stride, COSINE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr
):
    """w[h] = softmax(beta_h sim(k_h, M)) for one batch element, M in registers (Graves et al. 2014, eq. 5-6)."""
    i_b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    ok = usable_slots(p_mask, i_b, 0, N, BN)
    m = load_tile(p_memory + i_b * stride, 0, N, W, ok, BN, BW)
    im = inverse_norm(tl.sum(m * m, 1))
    for h in range(H):
        row = i_b * H + h
        s = similarity(m, im, load_vector(p_key + row * W, W, BW), COSINE)
        beta = 1.0
        if p_strength is not None:
            beta = tl.load(p_strength + row).to(tl.float32)
        extreme = tl.where(beta >= 0, tl.max(tl.where(ok, s, -float("inf")), 0), tl.min(tl.where(ok, s, float("inf")), 0))
        e = tl.where(ok, tl.exp(beta * (s - extreme)), 0.0)
        tl.store(p_out + row * N + n, (e * inverse(tl.sum(e, 0))).to(p_out.dtype.element_ty), mask=n < N)


@triton.jit
def content_addressing_bwd_kernel(
    p_grad, p_key, p_memory, p_strength, p_mask, p_dkey, p_dmemory, p_dstrength, H, N, W, stride,
    COSINE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """All gradients of one batch element, M in registers."""
    i_b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    ok = usable_slots(p_mask, i_b, 0, N, BN)
    usable = tl.max(ok.to(tl.int32), 0) > 0
    m = load_tile(p_memory + i_b * stride, 0, N, W, ok, BN, BW)
    norm2 = tl.sum(m * m, 1)
    im = inverse_norm(norm2)
    dm = tl.zeros([BN, BW], tl.float32)
    own = tl.zeros([BN], tl.float32)
    for h in range(H):
        row = i_b * H + h
        k = load_key(p_key, row, W, usable, BW)
        s = similarity(m, im, k, COSINE)
        beta = 1.0
        if p_strength is not None:
            beta = tl.load(p_strength + row).to(tl.float32)
        extreme = tl.where(beta >= 0, tl.max(tl.where(ok, s, -float("inf")), 0), tl.min(tl.where(ok, s, float("inf")), 0))
        e = tl.where(ok, tl.exp(beta * (s - extreme)), 0.0)
        x = e * inverse(tl.sum(e, 0))
        g = tl.load(p_grad + row * N + n, mask=n < N, other=0).to(tl.float32)
        t = tl.where(x == 0, 0.0, x * (g - tl.sum(x * g, 0)))
        if p_strength is not None:
            d = tl.sum(tl.where(t == 0, 0.0, t * (s - extreme)), 0)
            tl.store(p_dstrength + row, d.to(p_dstrength.dtype.element_ty))
        c = tl.where(t == 0, 0.0, t * beta)
        if COSINE:
            k2 = tl.sum(k * k, 0)
            ik = inverse_norm(k2)
            key_own = tl.where(k2 > EPS * EPS, tl.sum(c * s, 0) * ik * ik, 0.0)
            own += c * s
            c = tl.where(im == 0, 0.0, c * (ik * im))
            dk = tl.sum(c[:, None] * m, 0) - tl.where(key_own == 0, 0.0, key_own * k)
        else:
            dk = tl.sum(c[:, None] * m, 0)
        dm += c[:, None] * k[None, :]
        store_vector(p_dkey + row * W, dk, W, BW)
    if COSINE:
        dm -= tl.where(norm2 > EPS * EPS, own * im * im, 0.0)[:, None] * m
    store_tile(p_dmemory + i_b * N * W, dm, 0, N, W, BN, BW)


# Memories that a block does not hold ----------------------------------------------------------------------------------


@triton.jit
def content_addressing_sim_kernel(p_key, p_memory, p_mask, p_sim, H, N, W, stride, COSINE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """sim[b, h, n] of one tile of rows with every head's key."""
    T = tl.cdiv(N, BN)
    i = tl.program_id(0)
    i_b, n0 = (i // T).to(tl.int64), (i % T) * BN
    n = n0 + tl.arange(0, BN)
    m = load_tile(p_memory + i_b * stride, n0, N, W, usable_slots(p_mask, i_b, n0, N, BN), BN, BW)
    im = inverse_norm(tl.sum(m * m, 1))
    for h in range(H):
        row = i_b * H + h
        s = similarity(m, im, load_vector(p_key + row * W, W, BW), COSINE)
        tl.store(p_sim + row * N + n, s, mask=n < N)


@triton.jit
def content_addressing_fwd_kernel_rows(p_sim, p_strength, p_mask, p_out, H, N, rows, BR: tl.constexpr, BL: tl.constexpr):
    """Rows of weights from rows of similarities."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    real = r < rows
    batch = r // H
    beta = tl.full([BR], 1.0, tl.float32)
    if p_strength is not None:
        beta = tl.load(p_strength + r, mask=real, other=0).to(tl.float32)
    extreme, share = softmax_stats(p_sim, p_mask, r, real, batch, beta, N, BR, BL)
    for n0 in range(0, N, BL):
        n = n0 + tl.arange(0, BL)
        inside = real[:, None] & (n < N)[None, :]
        ok = inside
        sim = tl.load(p_sim + r[:, None] * N + n[None, :], mask=inside, other=0)
        if p_mask is not None:
            ok = ok & tl.load(p_mask + batch[:, None] * N + n[None, :], mask=inside, other=0).to(tl.int1)
        e = tl.where(ok, tl.exp(beta[:, None] * (sim - extreme[:, None])), 0.0)
        tl.store(p_out + r[:, None] * N + n[None, :], (e * share[:, None]).to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def content_addressing_bwd_kernel_rows(
    p_grad, p_sim, p_strength, p_mask, p_dsim, p_own, p_dstrength, H, N, rows, BR: tl.constexpr, BL: tl.constexpr
):
    """ds, ds.s and dbeta of rows of weights."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    real = r < rows
    batch = r // H
    beta = tl.full([BR], 1.0, tl.float32)
    if p_strength is not None:
        beta = tl.load(p_strength + r, mask=real, other=0).to(tl.float32)
    extreme, share = softmax_stats(p_sim, p_mask, r, real, batch, beta, N, BR, BL)
    mean = tl.zeros([BR, BL], tl.float32)
    for n0 in range(0, N, BL):
        n = n0 + tl.arange(0, BL)
        inside = real[:, None] & (n < N)[None, :]
        ok = inside
        if p_mask is not None:
            ok = ok & tl.load(p_mask + batch[:, None] * N + n[None, :], mask=inside, other=0).to(tl.int1)
        sim = tl.load(p_sim + r[:, None] * N + n[None, :], mask=inside, other=0)
        g = tl.load(p_grad + r[:, None] * N + n[None, :], mask=inside, other=0).to(tl.float32)
        mean += tl.where(ok, tl.exp(beta[:, None] * (sim - extreme[:, None])), 0.0) * share[:, None] * g
    mean_r = tl.sum(mean, 1)
    dbeta = tl.zeros([BR, BL], tl.float32)
    own = tl.zeros([BR, BL], tl.float32)
    for n0 in range(0, N, BL):
        n = n0 + tl.arange(0, BL)
        inside = real[:, None] & (n < N)[None, :]
        ok = inside
        if p_mask is not None:
            ok = ok & tl.load(p_mask + batch[:, None] * N + n[None, :], mask=inside, other=0).to(tl.int1)
        sim = tl.load(p_sim + r[:, None] * N + n[None, :], mask=inside, other=0)
        g = tl.load(p_grad + r[:, None] * N + n[None, :], mask=inside, other=0).to(tl.float32)
        x = tl.where(ok, tl.exp(beta[:, None] * (sim - extreme[:, None])), 0.0) * share[:, None]
        t = tl.where(x == 0, 0.0, x * (g - mean_r[:, None]))
        dbeta += tl.where(t == 0, 0.0, t * (sim - extreme[:, None]))
        d = tl.where(t == 0, 0.0, t * beta[:, None])
        own += tl.where(d == 0, 0.0, d * sim)
        tl.store(p_dsim + r[:, None] * N + n[None, :], d, mask=inside)
    tl.store(p_own + r, tl.sum(own, 1), mask=real)
    if p_strength is not None:
        tl.store(p_dstrength + r, tl.sum(dbeta, 1).to(p_dstrength.dtype.element_ty), mask=real)


@triton.jit
def content_addressing_bwd_kernel_tiles(
    p_key, p_memory, p_mask, p_sim, p_dsim, p_part, p_dmemory, B, H, N, W, stride,
    COSINE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """dm of one tile, and its share of dk in part [B, T, H, W]; a memory shared by the batch (stride 0) sums over it in order."""
    T = tl.cdiv(N, BN)
    i = tl.program_id(0)
    first, n0 = (i // T).to(tl.int64), (i % T) * BN
    last = first + 1
    if stride == 0:
        last = first + B
    n = n0 + tl.arange(0, BN)
    dm = tl.zeros([BN, BW], tl.float32)
    for i_b in range(first, last):
        ok = usable_slots(p_mask, i_b, n0, N, BN)
        usable = True
        if p_mask is not None:
            usable = any_usable(p_mask, i_b, N, 1024)
        m = load_tile(p_memory + i_b * stride, n0, N, W, ok, BN, BW)
        norm2 = tl.sum(m * m, 1)
        im = inverse_norm(norm2)
        own = tl.zeros([BN], tl.float32)
        for h in range(H):
            row = i_b * H + h
            k = load_key(p_key, row, W, usable, BW)
            c = tl.load(p_dsim + row * N + n, mask=n < N, other=0)
            if COSINE:
                s = tl.load(p_sim + row * N + n, mask=n < N, other=0)
                own += tl.where(c == 0, 0.0, c * s)
                c = tl.where(im == 0, 0.0, c * (inverse_norm(tl.sum(k * k, 0)) * im))
            dm += c[:, None] * k[None, :]
            store_vector(p_part + ((i_b * T + i % T) * H + h) * W, tl.sum(c[:, None] * m, 0), W, BW)
        if COSINE:
            dm -= tl.where(norm2 > EPS * EPS, own * im * im, 0.0)[:, None] * m
    store_tile(p_dmemory + first * N * W, dm, n0, N, W, BN, BW)


@triton.jit
def content_addressing_bwd_kernel_key(
    p_key, p_mask, p_own, p_part, p_dkey, H, N, W, T, COSINE: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr
):
    """dk of one head: the tiles' shares, and the key's own part."""
    row = tl.program_id(0).to(tl.int64)
    i_b, h = row // H, row % H
    w = tl.arange(0, BW)
    total = tl.zeros([BT, BW], tl.float32)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        at = ((i_b * T + t[:, None]) * H + h) * W + w[None, :]
        total += tl.load(p_part + at, mask=(t < T)[:, None] & (w < W)[None, :], other=0)
    dk = tl.sum(total, 0)
    if COSINE:
        usable = True
        if p_mask is not None:
            usable = any_usable(p_mask, i_b, N, 1024)
        k = load_key(p_key, row, W, usable, BW)
        k2 = tl.sum(k * k, 0)
        ik = inverse_norm(k2)
        own = tl.where(k2 > EPS * EPS, tl.load(p_own + row) * ik * ik, 0.0)
        dk -= tl.where(own == 0, 0.0, own * k)
    store_vector(p_dkey + row * W, dk, W, BW)


# Host -----------------------------------------------------------------------------------------------------------------


def similarities(key: Tensor, memory: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    """[B, H, N] float32, memory read once."""
    B, H, W = key.shape
    N = memory.shape[-2]
    sim = workspace(key, B, H, N)
    BN, BW, T, num_warps = tiles(N, W)
    stride = N * W if memory.dim() == 3 else 0
    args = key, memory, mask, sim, H, N, W, stride
    launch(content_addressing_sim_kernel, B * T, *args, num_warps=num_warps, COSINE=cosine, BN=BN, BW=BW)
    return sim


def similarities_bwd(
    key: Tensor, memory: Tensor, mask: Tensor | None, sim: Tensor, dsim: Tensor, own: Tensor, cosine: bool
) -> tuple[Tensor, Tensor]:
    """dkey and dmemory from dsim [B, H, N] and own [B, H], the sums of dsim * sim."""
    B, H, W = key.shape
    N = memory.shape[-2]
    dkey, dmemory = torch.empty_like(key), torch.empty_like(memory)
    BN, BW, T, num_warps = tiles(N, W)
    part = workspace(key, B, T, H, W)
    shared = memory.dim() == 2
    args = key, memory, mask, sim, dsim, part, dmemory, B, H, N, W, 0 if shared else N * W
    launch(content_addressing_bwd_kernel_tiles, (1 if shared else B) * T, *args, num_warps=num_warps, all_registers=True, COSINE=cosine, BN=BN, BW=BW)
    BT = max(1, min(power(T), sizes.tile // BW))
    args = key, mask, own, part, dkey, H, N, W, T
    launch(content_addressing_bwd_kernel_key, B * H, *args, num_warps=warps(BT * BW), COSINE=cosine, BT=BT, BW=BW)
    return dkey, dmemory


def content_addressing_fwd(key: Tensor, memory: Tensor, strength: Tensor | None, mask: Tensor | None, cosine: bool) -> Tensor:
    """memcore::content_addressing_fwd."""
    key, memory, strength, mask = (t if t is None else t.contiguous() for t in (key, memory, strength, mask))
    B, H, W = key.shape
    N = memory.shape[-2]
    out = key.new_empty(B, H, N)
    BN, BW = power(N), power(W)
    if BN * BW <= sizes.whole:
        args = key, memory, strength, mask, out, H, N, W, N * W if memory.dim() == 3 else 0
        launch(content_addressing_fwd_kernel, B, *args, num_warps=warps(BN * BW), COSINE=cosine, BN=BN, BW=BW)
        return out
    sim = similarities(key, memory, mask, cosine)
    BR, BL, num_warps = rows_block(B * H, N)
    args = sim, strength, mask, out, H, N, B * H
    launch(content_addressing_fwd_kernel_rows, triton.cdiv(B * H, BR), *args, num_warps=num_warps, BR=BR, BL=BL)
    return out


def content_addressing_bwd(
    grad: Tensor | None, key: Tensor, memory: Tensor, strength: Tensor | None, mask: Tensor | None, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """memcore::content_addressing_bwd."""
    if grad is None:
        grad = key.new_zeros(key.shape[0], key.shape[1], memory.shape[-2])
    grad, key, memory, strength, mask = (t if t is None else t.contiguous() for t in (grad, key, memory, strength, mask))
    B, H, W = key.shape
    N = memory.shape[-2]
    dstrength = key.new_empty(0) if strength is None else torch.empty_like(strength)
    BN, BW = power(N), power(W)
    if BN * BW <= sizes.whole and memory.dim() == 3:
        dkey, dmemory = torch.empty_like(key), torch.empty_like(memory)
        args = grad, key, memory, strength, mask, dkey, dmemory, dstrength, H, N, W, N * W
        launch(content_addressing_bwd_kernel, B, *args, num_warps=warps(BN * BW), all_registers=True, COSINE=cosine, BN=BN, BW=BW)
        return dkey, dmemory, dstrength
    sim = similarities(key, memory, mask, cosine)
    dsim, own = torch.empty_like(sim), workspace(key, B, H)
    BR, BL, num_warps = rows_block(B * H, N)
    args = grad, sim, strength, mask, dsim, own, dstrength, H, N, B * H
    launch(content_addressing_bwd_kernel_rows, triton.cdiv(B * H, BR), *args, num_warps=num_warps, BR=BR, BL=BL)
    dkey, dmemory = similarities_bwd(key, memory, mask, sim, dsim, own, cosine)
    return dkey, dmemory, dstrength
