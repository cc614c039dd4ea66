"""Reads in plain PyTorch."""

from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["read"]


def read(memory: Tensor, weights: Tensor) -> Tensor:
    """r[b,h] = sum over n of weights[b,h,n] * memory[b,n]; see memcore.functional.read."""
    with no_autocast(memory):
        return (accumulate(weights) @ accumulate(memory)).to(memory.dtype)
