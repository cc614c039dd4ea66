"""The least-used slots: checks and schema."""

import torch
from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference

__all__ = ["least_used"]

_OP = "least_used"


def _fake(usage, n):
    return usage.new_empty(usage.shape[0], torch.sym_min(n, usage.shape[1]), dtype=torch.int64)


_fwd = register(_OP, "Tensor usage, int n", reference.least_used, _fake)


def least_used(usage: Tensor, n: int) -> Tensor:
    """Indices of the n least-used slots (Santoro et al. 2016, the least-used weights).

    Ascending by (usage, index): the lowest index wins a tie, -0 equals 0, NaN counts as most used.

    Args:
        usage: [B, N].
        n: how many, >= 0; more than N gives all N.

    Returns:
        [B, min(n, N)] int64. Not differentiable.

    Raises:
        ValueError: wrong shape or n < 0. TypeError: usage not floating or n not an int.
    """
    (usage,) = _checks.common(_OP, ("usage", usage))
    _checks.dims(_OP, "usage", usage, "B, N")
    _checks.whole(_OP, "n", n, 0)
    if _backend.takes_kernel(_OP, usage.device):
        return _fwd(usage, n)
    return reference.least_used(usage, n)
