"""Interpolation in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate

__all__ = ["interpolate"]


def interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """gate * content + (1 - gate) * previous; see memcore.functional.interpolate."""
    with torch.autocast(content.device.type, enabled=False):
        g = accumulate(gate)[..., None]
        return (g * accumulate(content) + (1 - g) * accumulate(previous)).to(content.dtype)
