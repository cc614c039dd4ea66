"""Interpolation in Triton: one pass."""

import torch
import triton
from torch import Tensor

from .._triton import address_bwd_kernel as interpolate_bwd_kernel
from .._triton import address_kernel as interpolate_fwd_kernel
from .._triton import launch, rows_block

__all__ = ["interpolate_bwd", "interpolate_bwd_kernel", "interpolate_fwd", "interpolate_fwd_kernel"]


def interpolate_fwd(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """memcore::interpolate_fwd."""
    content, previous, gate = content.contiguous(), previous.contiguous(), gate.contiguous()
    B, H, N = content.shape
    out = torch.empty_like(content)
    BR, BL, num_warps = rows_block(B * H, N)
    args = content, previous, None, gate, None, None, None, out, N, 1, B * H
    launch(interpolate_fwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, BR=BR, BL=BL)
    return out


def interpolate_bwd(grad: Tensor | None, content: Tensor, previous: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """memcore::interpolate_bwd."""
    grad = torch.zeros_like(content) if grad is None else grad
    grad, content, previous, gate = grad.contiguous(), content.contiguous(), previous.contiguous(), gate.contiguous()
    B, H, N = content.shape
    dcontent, dprevious, dgate = torch.empty_like(content), torch.empty_like(previous), torch.empty_like(gate)
    BR, BL, num_warps = rows_block(B * H, N)
    args = grad, content, previous, None, gate, *[None] * 5, dcontent, dprevious, None, dgate, None, None, None, N, 1, B * H
    launch(interpolate_bwd_kernel, triton.cdiv(B * H, BR), *args, num_warps=num_warps, BR=BR, BL=BL)
    return dcontent, dprevious, dgate
