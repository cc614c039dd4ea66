"""Least-recently-used access in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate, no_autocast
from ..least_used.reference import least_used

__all__ = ["lrua_write"]


def lrua_write(
    memory: Tensor,
    key: Tensor,
    previous_read: Tensor,
    usage: Tensor,
    gate: Tensor,
    *,
    zero: str | None = "least_used",
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """w = gate * previous_read + (1 - gate) * onehot(least used), that slot zeroed, memory + w word^T; see memcore.functional.lrua_write."""
    with no_autocast(memory):
        m, w, g = accumulate(memory), accumulate(previous_read), accumulate(gate)[..., None]
        word = accumulate(key if add is None else add)
        N = m.shape[1]
        chosen = torch.arange(N, device=memory.device) == least_used(usage, 1)  # [B, N]
        weights = g * w + (1 - g) * chosen[:, None].to(m.dtype)
        if zero == "least_used":
            m = torch.where(chosen[..., None], 0, m)
        return (m + weights.mT @ word).to(memory.dtype), weights.to(memory.dtype)
