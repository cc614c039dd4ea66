"""Circular shift in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["circular_shift"]


def circular_shift(weights: Tensor, shift: Tensor) -> Tensor:
    """out_i = sum over j in -R..R of shift[j + R] * weights[(i - j) mod N]; see memcore.functional.circular_shift."""
    with no_autocast(weights):
        w, s = accumulate(weights), accumulate(shift)
        N, S = w.shape[-1], s.shape[-1]
        if N == 0:
            return w.to(weights.dtype, copy=True)
        rolled = torch.stack([w.roll(j - S // 2, -1) for j in range(S)], -1)  # [B, H, N, S]
        return (rolled * s[..., None, :]).sum(-1).to(weights.dtype)
