"""Usage of the slots in plain PyTorch."""

from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["usage_update"]


def usage_update(usage: Tensor, read_weights: Tensor, write_weights: Tensor, decay: float) -> Tensor:
    """decay * usage + sum over h of read + sum over h of write weights; see memcore.functional.usage_update."""
    with no_autocast(usage):
        u, r, w = (accumulate(t) for t in (usage, read_weights, write_weights))
        return (decay * u + r.sum(1) + w.sum(1)).to(usage.dtype)
