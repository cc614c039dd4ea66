"""Sharpening in Triton: extreme, sum and result of each row in one block."""

import torch
import triton
from torch import Tensor

from .._triton import address_bwd_kernel as sharpen_bwd_kernel
from .._triton import address_kernel as sharpen_fwd_kernel
from .._triton import launch, rows_block

__all__ = ["sharpen_bwd", "sharpen_bwd_kernel", "sharpen_fwd", "sharpen_fwd_kernel"]


def sharpen_fwd(weights: Tensor, gamma: Tensor) -> Tensor:
    """memcore::sharpen_fwd."""
    weights, gamma = weights.contiguous(), gamma.contiguous()
    B, H, N = weights.shape
    out = torch.empty_like(weights)
    BR, BL, num_warps = rows_block(B * H, N)
    args = weights, None, None, None, None, gamma, None, out, N, 1, B * H
    launch(sharpen_fwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, BR=BR, BL=BL)
    return out


def sharpen_bwd(grad: Tensor | None, weights: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """memcore::sharpen_bwd."""
    grad = torch.zeros_like(weights) if grad is None else grad
    grad, weights, gamma = grad.contiguous(), weights.contiguous(), gamma.contiguous()
    B, H, N = weights.shape
    dweights, dgamma = torch.empty_like(weights), torch.empty_like(gamma)
    BR, BL, num_warps = rows_block(B * H, N)
    args = grad, weights, *[None] * 4, gamma, None, dweights, *[None] * 6, dgamma, None, N, 1, B * H
    launch(sharpen_bwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, all_registers=True, BR=BR, BL=BL)
    return dweights, dgamma
