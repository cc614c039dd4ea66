"""The NTM's addressing in Triton: similarities by tiles of memory, then every row's softmax, interpolation, shift and sharpening in one kernel."""

import torch
import triton
from torch import Tensor

from .._triton import address_bwd_kernel as ntm_addressing_bwd_kernel
from .._triton import address_kernel as ntm_addressing_fwd_kernel
from .._triton import launch, rows_block, workspace
from ..content_addressing.triton import similarities, similarities_bwd

__all__ = ["ntm_addressing_bwd", "ntm_addressing_bwd_kernel", "ntm_addressing_fwd", "ntm_addressing_fwd_kernel"]


def ntm_addressing_fwd(
    key: Tensor, memory: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, gamma: Tensor, previous: Tensor
) -> Tensor:
    """memcore::ntm_addressing_fwd."""
    all_args = key, memory, strength, gate, shift, gamma, previous
    key, memory, strength, gate, shift, gamma, previous = (t.contiguous() for t in all_args)
    B, H, N = previous.shape
    out = torch.empty_like(previous)
    sim = similarities(key, memory, None, True)
    BR, BL, num_warps = rows_block(B * H, N)
    args = sim, previous, strength, gate, shift, gamma, torch.empty_like(sim), out, N, shift.shape[-1], B * H
    launch(ntm_addressing_fwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, all_registers=True, BR=BR, BL=BL)
    return out


def ntm_addressing_bwd(
    grad: Tensor | None, key: Tensor, memory: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, gamma: Tensor, previous: Tensor
) -> tuple[Tensor, ...]:
    """memcore::ntm_addressing_bwd."""
    grad = torch.zeros_like(previous) if grad is None else grad
    all_args = grad, key, memory, strength, gate, shift, gamma, previous
    grad, key, memory, strength, gate, shift, gamma, previous = (t.contiguous() for t in all_args)
    B, H, N = previous.shape
    dstrength, dgate, dshift, dgamma, dprevious = (torch.empty_like(t) for t in (strength, gate, shift, gamma, previous))
    sim = similarities(key, memory, None, True)
    work, dsim, du, own = torch.empty_like(sim), torch.empty_like(sim), torch.empty_like(sim), workspace(key, B, H)
    BR, BL, num_warps = rows_block(B * H, N)
    args = (
        grad, sim, previous, strength, gate, shift, gamma, work, dsim, du,
        dsim, dprevious, dstrength, dgate, dshift, dgamma, own, N, shift.shape[-1], B * H,
    )  # fmt: skip
    launch(ntm_addressing_bwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, all_registers=True, BR=BR, BL=BL)
    dkey, dmemory = similarities_bwd(key, memory, None, sim, dsim, own, True)
    return dkey, dmemory, dstrength, dgate, dshift, dgamma, dprevious
