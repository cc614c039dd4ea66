"""Sharpening in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["sharpen"]


def sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    """w^gamma / sum w^gamma as softmax(gamma * log w) over the positive weights; see memcore.functional.sharpen."""
    with no_autocast(weights):
        w, g = accumulate(weights), accumulate(gamma)[..., None]
        if w.shape[-1] == 0:
            return w.to(weights.dtype, copy=True)
        nothing = w <= 0  # not NaN, which has to spread
        log = torch.where(nothing, 1, w).log()
        d = log.detach()
        top, low = d.masked_fill(nothing, -torch.inf).amax(-1, True), d.masked_fill(nothing, torch.inf).amin(-1, True)
        extreme = torch.where(nothing.all(-1, keepdim=True), 0, torch.where(g >= 0, top, low)).detach()
        e = (g * (log - extreme)).masked_fill(nothing, -torch.inf).exp()
        total = e.sum(-1, keepdim=True)
        return torch.where(g.isnan(), g, e / torch.where(total == 0, 1, total)).to(weights.dtype)
