"""Erase/add writes in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["erase_add_write", "erase_add_write_"]


def erase_add_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """memory * prod over h of (1 - w_h e_h^T) + sum over h of w_h a_h^T; see memcore.functional.erase_add_write."""
    with no_autocast(memory):
        m, w, e, a = (accumulate(t) for t in (memory, weights, erase, add))
        for h in range(w.shape[1]):
            m = m * (1 - w[:, h, :, None] * e[:, h, None])
        return (m + w.mT @ a).to(memory.dtype)


def erase_add_write_(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """`erase_add_write` into `memory` itself."""
    # The backward needs the memory as it was: differentiate a copy.
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (memory, weights, erase, add))
    return memory.copy_(erase_add_write(memory.clone() if tracked else memory, weights, erase, add))
