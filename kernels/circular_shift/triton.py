"""Circular shift in Triton: every output gathers its S neighbours."""

import torch
import triton
from torch import Tensor

from .._triton import address_bwd_kernel as circular_shift_bwd_kernel
from .._triton import address_kernel as circular_shift_fwd_kernel
from .._triton import launch, rows_block

__all__ = ["circular_shift_bwd", "circular_shift_bwd_kernel", "circular_shift_fwd", "circular_shift_fwd_kernel"]


def circular_shift_fwd(weights: Tensor, shift: Tensor) -> Tensor:
    """memcore::circular_shift_fwd."""
    weights, shift = weights.contiguous(), shift.contiguous()
    B, H, N = weights.shape
    out = torch.empty_like(weights)
    BR, BL, num_warps = rows_block(B * H, N)
    args = weights, None, None, None, shift, None, None, out, N, shift.shape[-1], B * H
    launch(circular_shift_fwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, BR=BR, BL=BL)
    return out


def circular_shift_bwd(grad: Tensor | None, weights: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """memcore::circular_shift_bwd."""
    grad = torch.zeros_like(weights) if grad is None else grad
    grad, weights, shift = grad.contiguous(), weights.contiguous(), shift.contiguous()
    B, H, N = weights.shape
    dweights, dshift = torch.empty_like(weights), torch.empty_like(shift)
    BR, BL, num_warps = rows_block(B * H, N)
    args = grad, weights, None, None, None, shift, *[None] * 4, dweights, None, None, None, dshift, None, None, N, shift.shape[-1], B * H
    launch(circular_shift_bwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, BR=BR, BL=BL)
    return dweights, dshift
