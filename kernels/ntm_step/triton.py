"""A whole NTM time step in Triton: one launch forward, one backward, a program for each batch element.

A memory that a program holds is read once: up to 8192 elements, forward up to 32768 where slots and width are powers of two. Others go
in tiles of slots, twice forward (similarities, then write and reads) and three times backward (similarities, the write's and reads'
gradients, the similarities'). Rows of weights, and the activated interface, pass through
a workspace of the element's own in float32; a barrier stands between its writers and readers.

Backward, with f_h = 1 - w_h e_h, A = sum over read heads of w_r dr_r^T, G = dM' + A where the write comes first, else dM':
q_h = G m prod over h' != h of f_h', dw_h = sum_w (a_h G - e_h q_h), de_h = -sum_n w_h q_h, da_h = sum_n w_h G, dw_r = x dr_r with x
the memory that was read; dm = G prod f (+ A where the reads come first) + what the similarities say (see content_addressing).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    EPS,
    added,
    address,
    address_bwd,
    erased,
    inverse_norm,
    launch,
    load_slots,
    load_tile,
    load_vector,
    power,
    rows_block,
    similarity,
    sizes,
    split_heads,
    store_tile,
    store_vector,
    tiles,
    warps,
    wide,
    workspace,
)

__all__ = ["ntm_step_bwd", "ntm_step_fwd"]


# The interface --------------------------------------------------------------------------------------------------------


@triton.jit
def head_at(h, R, W, S):
    """Where head h begins: key [W], strength, gate, shift [S], gamma; a write head (h >= R) goes on with erase [W], add [W]."""
    return h * (W + 3 + S) + tl.maximum(h - R, 0) * 2 * W


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x), with log1p(y) = log(u) y / (u - 1) for u = 1 + y rounded."""
    y = tl.exp(-tl.abs(x))
    u = 1 + y
    return tl.maximum(x, 0) + tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def activate(
    p_x, p_beta, p_gate, p_gamma, p_shift, p_erase, p_add, R, Hw, W, S, BH: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """The parameters of all heads, erase and add [Hw, W], from the raw interface."""
    h = tl.arange(0, BH)
    real = h < R + Hw
    p = p_x + head_at(h, R, W, S) + W
    tl.store(p_beta + h, softplus(tl.load(p, mask=real, other=0).to(tl.float32)), mask=real)
    tl.store(p_gate + h, sigmoid(tl.load(p + 1, mask=real, other=0).to(tl.float32)), mask=real)
    tl.store(p_gamma + h, 1 + softplus(tl.load(p + 2 + S, mask=real, other=0).to(tl.float32)), mask=real)
    top = tl.full([BH], -float("inf"), tl.float32)
    for j in range(S):
        top = tl.maximum(top, tl.load(p + 2 + j, mask=real, other=0).to(tl.float32))
    total = tl.zeros([BH], tl.float32)
    for j in range(S):
        total += tl.exp(tl.load(p + 2 + j, mask=real, other=0).to(tl.float32) - top)
    for j in range(S):
        e = tl.exp(tl.load(p + 2 + j, mask=real, other=0).to(tl.float32) - top)
        tl.store(p_shift + h * S + j, e / total, mask=real)
    for i in range(Hw):
        p_i = p_x + head_at(R + i, R, W, S) + W + 3 + S
        store_vector(p_erase + i * W, sigmoid(load_vector(p_i, W, BW)), W, BW)
        store_vector(p_add + i * W, load_vector(p_i + W, W, BW), W, BW)


@triton.jit
def parameters_bwd(p_x, p_dx, p_gate, p_shift, p_dbeta, p_dgate, p_dgamma, p_dshift, R, Hw, W, S, BH: tl.constexpr):
    """The interface's gradients of strength, gate, shift and gamma, from those of the parameters."""
    h = tl.arange(0, BH)
    real = h < R + Hw
    at = head_at(h, R, W, S) + W
    d = tl.load(p_dbeta + h, mask=real, other=0) * sigmoid(tl.load(p_x + at, mask=real, other=0).to(tl.float32))
    tl.store(p_dx + at, d.to(p_dx.dtype.element_ty), mask=real)
    g = tl.load(p_gate + h, mask=real, other=0)
    tl.store(p_dx + at + 1, (tl.load(p_dgate + h, mask=real, other=0) * g * (1 - g)).to(p_dx.dtype.element_ty), mask=real)
    d = tl.load(p_dgamma + h, mask=real, other=0) * sigmoid(tl.load(p_x + at + 2 + S, mask=real, other=0).to(tl.float32))
    tl.store(p_dx + at + 2 + S, d.to(p_dx.dtype.element_ty), mask=real)
    mean = tl.zeros([BH], tl.float32)
    for j in range(S):
        mean += tl.load(p_shift + h * S + j, mask=real, other=0) * tl.load(p_dshift + h * S + j, mask=real, other=0)
    for j in range(S):
        d = tl.load(p_shift + h * S + j, mask=real, other=0) * (tl.load(p_dshift + h * S + j, mask=real, other=0) - mean)
        tl.store(p_dx + at + 2 + j, d.to(p_dx.dtype.element_ty), mask=real)


# Tiles ----------------------------------------------------------------------------------------------------------------


@triton.jit
def keep(p_memory, N, W, T: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """What registers hold from here on: the memory as one tile [BN, BW], or as the T tiles [T, BN, BW] that it fills; nothing for T = 0."""
    if T == 1:
        return load_tile(p_memory, 0, N, W, True, BN, BW)
    elif T > 1:
        n = tl.arange(0, T)[:, None] * BN + tl.arange(0, BN)[None, :]
        return tl.load(p_memory + n[:, :, None] * BW + tl.arange(0, BW)[None, None, :])
    else:
        return tl.zeros([1], tl.float32)


@triton.jit
def tile(kept, p_memory, n0, N, W, T: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """Slots n0.. of the memory: [BN, BW] float32. Of several kept tiles a thread holds the same part, so that no word changes threads."""
    if T == 1:
        return kept
    elif T > 1:
        return tl.sum(tl.where((tl.arange(0, T) == n0 // BN)[:, None, None], kept, 0.0).to(tl.float32), 0)
    else:
        return load_tile(p_memory, n0, N, W, True, BN, BW)


@triton.jit
def last(N, T: tl.constexpr, BN: tl.constexpr):
    """Where a loop over the tiles ends: known to the compiler if there is one tile, which needs no loop."""
    if T == 1:
        return BN
    else:
        return N


@triton.jit
def similarities(kept, p_memory, p_x, p_sim, R, Hw, N, W, S, T: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """sim [H, N] of every head's key with every slot."""
    for n0 in range(0, last(N, T, BN), BN):
        n = n0 + tl.arange(0, BN)
        m = tile(kept, p_memory, n0, N, W, T, BN, BW)
        im = inverse_norm(tl.sum(m * m, 1))
        for h in range(R + Hw):
            s = similarity(m, im, load_vector(p_x + head_at(h, R, W, S), W, BW), True)
            tl.store(p_sim + wide(h) * N + n, s, mask=n < N)


@triton.jit
def weigh(
    p_sim, p_previous, p_beta, p_gate, p_shift, p_gamma, p_work, p_out, p_keep, H, N, S, BR: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """Every head's weights [H, N]; visible to all before and after."""
    for h0 in range(0, H, BR):
        rows = wide(h0) + tl.arange(0, BR)
        address(p_sim, p_previous, p_beta, p_gate, p_shift, p_gamma, p_work, p_out, p_keep, rows, rows < H, N, S, BR, BL)
    tl.debug_barrier()


@triton.jit
def place(heads, g, value):
    """value [BW] in row g of [G, BW], zero elsewhere."""
    return tl.where((heads == g)[:, None], value[None, :], 0.0)


@triton.jit
def ntm_step_fwd_kernel(
    p_memory, p_interface, p_previous, p_written, p_reads, p_weights, p_small, p_rows, R, Hw, N, W, S,
    WRITE_FIRST: tl.constexpr, T: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
    G: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Activations, addressing, write and reads of one batch element (Graves et al. 2014, eq. 2-9).

    Workspace: p_small [B, H (3 + S) + 2 Hw W] the activated interface, p_rows [B, 3, H, N] similarities, rows before sharpening, weights.
    """
    i_b = tl.program_id(0).to(tl.int64)
    H = R + Hw
    rows = wide(H) * N
    p_x = p_interface + i_b * (H * (W + 3 + S) + 2 * Hw * W)
    p_memory += i_b * N * W
    p_beta = p_small + i_b * (H * (3 + S) + 2 * Hw * W)
    p_gate, p_gamma, p_shift = p_beta + H, p_beta + 2 * H, p_beta + 3 * H
    p_erase = p_shift + H * S
    p_add = p_erase + Hw * W
    p_sim = p_rows + i_b * 3 * rows
    p_keep = p_sim + 2 * rows
    kept = keep(p_memory, N, W, T, BN, BW)
    activate(p_x, p_beta, p_gate, p_gamma, p_shift, p_erase, p_add, R, Hw, W, S, BH, BW)
    similarities(kept, p_memory, p_x, p_sim, R, Hw, N, W, S, T, BN, BW)
    tl.debug_barrier()
    weigh(
        p_sim, p_previous + i_b * rows, p_beta, p_gate, p_shift, p_gamma, p_sim + rows, p_weights + i_b * rows, p_keep, H, N, S, BR, BL
    )  # fmt: skip
    heads, w = tl.arange(0, G), tl.arange(0, BW)
    for r0 in range(0, GROUPS * G, G):
        total = tl.zeros([G, BW], tl.float32)
        for n0 in range(0, last(N, T, BN), BN):
            m = tile(kept, p_memory, n0, N, W, T, BN, BW)
            written = erased(m, p_keep + wide(R) * N, p_erase, n0, Hw, -1, N, W, BN, BW)
            written = added(written, p_keep + wide(R) * N, p_add, n0, Hw, N, W, BN, BW)
            if r0 == 0:
                store_tile(p_written + i_b * N * W, written, n0, N, W, BN, BW)
            if WRITE_FIRST:
                seen = written
            else:
                seen = m
            for g in range(tl.minimum(G, R - r0)):
                c = load_slots(p_keep + wide(r0 + g) * N, n0, N, BN)
                total += place(heads, g, tl.sum(c[:, None] * seen, 0))
        at = (i_b * R + r0 + heads[:, None]) * W + w[None, :]
        tl.store(p_reads + at, total.to(p_reads.dtype.element_ty), mask=(r0 + heads < R)[:, None] & (w < W)[None, :])


@triton.jit
def asked(m, p_keep, p_greads, n0, R, N, W, BN: tl.constexpr, BW: tl.constexpr):
    """m + what the reads ask of it: sum over read heads of w_r dr_r^T."""
    if p_greads is None:
        return m
    else:
        return added(m, p_keep, p_greads, n0, R, N, W, BN, BW)


@triton.jit
def grown(p_gmemory, n0, N, W, BN: tl.constexpr, BW: tl.constexpr):
    """The gradient of the written memory."""
    if p_gmemory is None:
        return tl.zeros([BN, BW], tl.float32)
    else:
        return load_tile(p_gmemory, n0, N, W, True, BN, BW)


@triton.jit
def ntm_step_bwd_kernel(
    p_gmemory, p_greads, p_gweights, p_memory, p_interface, p_previous, p_dmemory, p_dinterface, p_dprevious, p_small, p_rows,
    R, Hw, N, W, S, WRITE_FIRST: tl.constexpr, T: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
    GW: tl.constexpr, WRITE_GROUPS: tl.constexpr, GH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """All gradients of one batch element, from the inputs alone.

    Workspace: p_small [B, H (7 + 2 S) + 2 Hw W], p_rows [B, 5, H, N] similarities, rows before sharpening, weights, gradients of the
    weights (then of the content weights), gradients before sharpening (then of the similarities).
    """
    i_b = tl.program_id(0).to(tl.int64)
    H = R + Hw
    rows = wide(H) * N
    size = H * (W + 3 + S) + 2 * Hw * W
    p_x, p_dx = p_interface + i_b * size, p_dinterface + i_b * size
    p_memory += i_b * N * W
    if p_gmemory is not None:
        p_gmemory += i_b * N * W
    if p_greads is not None:
        p_greads += i_b * R * W
    p_beta = p_small + i_b * (H * (7 + 2 * S) + 2 * Hw * W)
    p_gate, p_gamma, p_dbeta, p_dgate, p_dgamma = p_beta + H, p_beta + 2 * H, p_beta + 3 * H, p_beta + 4 * H, p_beta + 5 * H
    p_own, p_shift = p_beta + 6 * H, p_beta + 7 * H
    p_dshift = p_shift + H * S
    p_erase = p_dshift + H * S
    p_add = p_erase + Hw * W
    p_sim = p_rows + i_b * 5 * rows
    p_work, p_keep, p_d, p_dsim = p_sim + rows, p_sim + 2 * rows, p_sim + 3 * rows, p_sim + 4 * rows
    p_writes = p_keep + wide(R) * N
    kept = keep(p_memory, N, W, T, BN, BW)
    activate(p_x, p_beta, p_gate, p_gamma, p_shift, p_erase, p_add, R, Hw, W, S, BH, BW)
    similarities(kept, p_memory, p_x, p_sim, R, Hw, N, W, S, T, BN, BW)
    tl.debug_barrier()
    p_previous += i_b * rows
    weigh(p_sim, p_previous, p_beta, p_gate, p_shift, p_gamma, p_work, p_keep, None, H, N, S, BR, BL)

    # The write and the reads: gradients of all weights, erase and add.
    heads, w = tl.arange(0, GW), tl.arange(0, BW)
    for h0 in range(0, WRITE_GROUPS * GW, GW):
        de, da = tl.zeros([GW, BW], tl.float32), tl.zeros([GW, BW], tl.float32)
        for n0 in range(0, last(N, T, BN), BN):
            n = n0 + tl.arange(0, BN)
            m = tile(kept, p_memory, n0, N, W, T, BN, BW)
            g = grown(p_gmemory, n0, N, W, BN, BW)
            if WRITE_FIRST:
                g = asked(g, p_keep, p_greads, n0, R, N, W, BN, BW)
            for j in range(tl.minimum(GW, Hw - h0)):
                h = h0 + j
                c = load_slots(p_writes + wide(h) * N, n0, N, BN)
                a, e = load_vector(p_add + h * W, W, BW), load_vector(p_erase + h * W, W, BW)
                q = erased(g * m, p_writes, p_erase, n0, Hw, h, N, W, BN, BW)
                d = tl.sum(a[None, :] * g - e[None, :] * q, 1)
                if p_gweights is not None:
                    d += load_slots(p_gweights + i_b * rows + wide(R + h) * N, n0, N, BN)
                tl.store(p_d + wide(R + h) * N + n, d, mask=n < N)
                de -= place(heads, j, tl.sum(c[:, None] * q, 0))
                da += place(heads, j, tl.sum(c[:, None] * g, 0))
            if h0 == 0:
                if WRITE_FIRST:
                    m = erased(m, p_writes, p_erase, n0, Hw, -1, N, W, BN, BW)
                    m = added(m, p_writes, p_add, n0, Hw, N, W, BN, BW)
                for r in range(R):
                    d = tl.zeros([BN], tl.float32)
                    if p_greads is not None:
                        d += tl.sum(m * load_vector(p_greads + r * W, W, BW)[None, :], 1)
                    if p_gweights is not None:
                        d += load_slots(p_gweights + i_b * rows + wide(r) * N, n0, N, BN)
                    tl.store(p_d + wide(r) * N + n, d, mask=n < N)
        h = h0 + heads
        ok = (h < Hw)[:, None] & (w < W)[None, :]
        e = tl.load(p_erase + h[:, None] * W + w[None, :], mask=ok, other=0)
        at = (head_at(R + h, R, W, S) + W + 3 + S)[:, None] + w[None, :]
        tl.store(p_dx + at, (de * e * (1 - e)).to(p_dx.dtype.element_ty), mask=ok)
        tl.store(p_dx + at + W, da.to(p_dx.dtype.element_ty), mask=ok)
    tl.debug_barrier()

    # Back through sharpening, shift, interpolation and softmax.
    p_dprevious += i_b * rows
    for h0 in range(0, H, BR):
        r = wide(h0) + tl.arange(0, BR)
        address_bwd(
            p_d, p_sim, p_previous, p_beta, p_gate, p_shift, p_gamma, p_work, p_dsim, p_d,
            p_dsim, p_dprevious, p_dbeta, p_dgate, p_dshift, p_dgamma, p_own, r, r < H, N, S, BR, BL,
        )  # fmt: skip
    tl.debug_barrier()
    parameters_bwd(p_x, p_dx, p_gate, p_shift, p_dbeta, p_dgate, p_dgamma, p_dshift, R, Hw, W, S, BH)

    # Back through the similarities, and the memory's gradient of everything.
    heads = tl.arange(0, GH)
    for h0 in range(0, GROUPS * GH, GH):
        dk = tl.zeros([GH, BW], tl.float32)
        for n0 in range(0, last(N, T, BN), BN):
            n = n0 + tl.arange(0, BN)
            m = tile(kept, p_memory, n0, N, W, T, BN, BW)
            norm2 = tl.sum(m * m, 1)
            im = inverse_norm(norm2)
            dm = grown(p_gmemory, n0, N, W, BN, BW)
            if WRITE_FIRST:
                dm = erased(asked(dm, p_keep, p_greads, n0, R, N, W, BN, BW), p_writes, p_erase, n0, Hw, -1, N, W, BN, BW)
            else:
                dm = asked(erased(dm, p_writes, p_erase, n0, Hw, -1, N, W, BN, BW), p_keep, p_greads, n0, R, N, W, BN, BW)
            own = tl.zeros([BN], tl.float32)
            for h in range(H):
                k = load_vector(p_x + head_at(h, R, W, S), W, BW)
                c = load_slots(p_dsim + wide(h) * N, n0, N, BN)
                own += tl.where(c == 0, 0.0, c * load_slots(p_sim + wide(h) * N, n0, N, BN))
                c = tl.where(im == 0, 0.0, c * (inverse_norm(tl.sum(k * k, 0)) * im))
                dm += c[:, None] * k[None, :]
                dk += place(heads, h - h0, tl.sum(c[:, None] * m, 0))
            if h0 == 0:
                dm -= tl.where(norm2 > EPS * EPS, own * im * im, 0.0)[:, None] * m
                store_tile(p_dmemory + i_b * N * W, dm, n0, N, W, BN, BW)
        h = h0 + heads
        ok = (h < H)[:, None] & (w < W)[None, :]
        at = head_at(h, R, W, S)[:, None] + w[None, :]
        k = tl.load(p_x + at, mask=ok, other=0).to(tl.float32)
        k2 = tl.sum(k * k, 1)
        ik = inverse_norm(k2)
        c = tl.where(k2 > EPS * EPS, tl.load(p_own + h) * ik * ik, 0.0)
        dk -= tl.where((c == 0)[:, None], 0.0, c[:, None] * k)
        tl.store(p_dx + at, dk.to(p_dx.dtype.element_ty), mask=ok)


# Host -----------------------------------------------------------------------------------------------------------------


def _blocks(H: int, N: int, W: int, whole: int, kept: int) -> tuple[dict, int]:
    """Block sizes and warps. A memory of up to `whole` elements is one tile, one of up to `kept` that fills its tiles several.

    Masked loads of so many tiles at once spill registers.
    """
    BN, BW, T, num_warps = tiles(N, W)
    if power(N) * BW <= whole:
        T, BN, num_warps = 1, power(N), warps(power(N) * BW)
    elif N * W > kept or N * W != power(N) * BW or not 16 <= W <= sizes.tile:
        T = 0
    BR, BL, _ = rows_block(H, N)
    return {"T": T, "BN": BN, "BW": BW, "BH": power(H), "BR": BR, "BL": BL}, num_warps


def _groups(heads: int, BW: int) -> tuple[int, int]:
    """Heads whose sums a block keeps at once, and how often that is: at least once, for what else the loop does."""
    group = split_heads(heads, BW)
    return group, max(1, triton.cdiv(heads, group))


def ntm_step_fwd(
    memory: Tensor, interface: Tensor, previous: Tensor, read_heads: int, write_heads: int, shift_range: int, write_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """memcore::ntm_step_fwd."""
    memory, interface, previous = (t.contiguous() for t in (memory, interface, previous))
    B, N, W = memory.shape
    R, Hw, S = read_heads, write_heads, 2 * shift_range + 1
    H = R + Hw
    written, reads, weights = torch.empty_like(memory), memory.new_empty(B, R, W), torch.empty_like(previous)
    small, rows = workspace(memory, B, H * (3 + S) + 2 * Hw * W), workspace(memory, B, 3, H, N)
    blocks, num_warps = _blocks(H, N, W, sizes.whole, sizes.kept)
    args = memory, interface, previous, written, reads, weights, small, rows, R, Hw, N, W, S
    G, groups = _groups(R, blocks["BW"])
    launch(
        ntm_step_fwd_kernel, B, *args, num_warps=num_warps, all_registers=True, WRITE_FIRST=write_first, G=G, GROUPS=groups, **blocks
    )  # fmt: skip
    return written, reads, weights


def ntm_step_bwd(
    grad_memory: Tensor | None, grad_reads: Tensor | None, grad_weights: Tensor | None,
    memory: Tensor, interface: Tensor, previous: Tensor, read_heads: int, write_heads: int, shift_range: int, write_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """memcore::ntm_step_bwd."""
    grads = [t if t is None else t.contiguous() for t in (grad_memory, grad_reads, grad_weights)]
    memory, interface, previous = (t.contiguous() for t in (memory, interface, previous))
    B, N, W = memory.shape
    R, Hw, S = read_heads, write_heads, 2 * shift_range + 1
    H = R + Hw
    dmemory, dinterface, dprevious = (torch.empty_like(t) for t in (memory, interface, previous))
    small, rows = workspace(memory, B, H * (7 + 2 * S) + 2 * Hw * W), workspace(memory, B, 5, H, N)
    blocks, num_warps = _blocks(H, N, W, sizes.tile, sizes.tile)  # with 16 warps for more the registers spill
    args = *grads, memory, interface, previous, dmemory, dinterface, dprevious, small, rows, R, Hw, N, W, S
    (GW, write_groups), (GH, groups) = _groups(Hw, blocks["BW"]), _groups(H, blocks["BW"])
    launch(
        ntm_step_bwd_kernel, B, *args, num_warps=num_warps, all_registers=True, WRITE_FIRST=write_first,
        GW=GW, WRITE_GROUPS=write_groups, GH=GH, GROUPS=groups, **blocks,
    )  # fmt: skip
    return dmemory, dinterface, dprevious
