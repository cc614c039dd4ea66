"""Interpolation in plain PyTorch."""

from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["interpolate"]


def interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """gate * content + (1 - gate) * previous; see memcore.functional.interpolate."""
    with no_autocast(content):
        g = accumulate(gate)[..., None]
        return (g * accumulate(content) + (1 - g) * accumulate(previous)).to(content.dtype)
