"""Sharpening: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference

__all__ = ["sharpen"]

_OP = "sharpen"
_fwd = register(
    _OP,
    "Tensor weights, Tensor gamma",
    reference.sharpen,
    lambda weights, gamma: weights.new_empty(weights.shape),
    differentiable=("weights", "gamma"),
)


def sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    """Concentrate weights on their largest entries (Graves et al. 2014, eq. 9).

    out[b,h,n] = weights[b,h,n]^gamma[b,h] / sum over m of weights[b,h,m]^gamma[b,h], computed as softmax(gamma * log w), so
    that no gamma loses the mass. Zero and negative (rounding residue) weights stay 0 with gradient 0; an all-zero row stays zero.

    Args:
        weights: [B, H, N], not negative.
        gamma: [B, H], meant to be >= 1.

    Returns:
        [B, H, N]; each row with a positive weight sums to 1. Differentiable to any order in both arguments.

    Raises:
        ValueError: wrong shape. TypeError: not floating. RuntimeError: devices differ.
    """
    weights, gamma = _checks.common(_OP, ("weights", weights), ("gamma", gamma))
    _checks.dims(_OP, "weights", weights, "B, H, N")
    _checks.shape(_OP, "gamma", gamma, "B, H", weights.shape[:2], "weights", weights.shape)
    if _backend.takes_kernel(_OP, weights.device):
        return _fwd(weights, gamma)
    return reference.sharpen(weights, gamma)
