"""The least-used slots in plain PyTorch."""

import torch
from torch import Tensor

__all__ = ["least_used"]


def least_used(usage: Tensor, n: int) -> Tensor:
    """Indices of the n smallest, ascending by (usage, index), NaN last; see memcore.functional.least_used."""
    return torch.sort(usage.detach(), dim=-1, stable=True).indices[:, :n]
