"""Reads in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate

__all__ = ["read"]


def read(memory: Tensor, weights: Tensor) -> Tensor:
    """r[b,h] = sum over n of weights[b,h,n] * memory[b,n]; see memcore.functional.read."""
    with torch.autocast(memory.device.type, enabled=False):
        return (accumulate(weights) @ accumulate(memory)).to(memory.dtype)
