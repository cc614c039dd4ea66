"""Circular shift: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference

__all__ = ["circular_shift"]

_OP = "circular_shift"
_fwd = register(
    _OP,
    "Tensor weights, Tensor shift",
    reference.circular_shift,
    lambda weights, shift: weights.new_empty(weights.shape),
    differentiable=("weights", "shift"),
)


def circular_shift(weights: Tensor, shift: Tensor) -> Tensor:
    """Convolve weights with a distribution over shifts, around the ends (Graves et al. 2014, eq. 8).

    out[b,h,i] = sum over j in -R..R of shift[b,h,j+R] * weights[b,h,(i-j) mod N]: mass on shift[R+1] moves the focus to
    the NEXT slot. A one-hot shift equals torch.roll bit for bit.

    Args:
        weights: [B, H, N].
        shift: [B, H, S], S = 2R + 1 odd; may be wider than N.

    Returns:
        [B, H, N]. Differentiable to any order in both arguments.

    Raises:
        ValueError: wrong shape or even S. TypeError: not floating. RuntimeError: devices differ.

    Example:
        >>> import torch, memcore
        >>> memcore.functional.circular_shift(torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]]))
        tensor([[[0., 1., 0.]]])
    """
    weights, shift = _checks.common(_OP, ("weights", weights), ("shift", shift))
    _checks.dims(_OP, "weights", weights, "B, H, N")
    _checks.dims(_OP, "shift", shift, "B, H, S")
    B, H, _ = weights.shape
    _checks.shape(_OP, "shift", shift, "B, H, S", (B, H, shift.shape[-1]), "weights", weights.shape)
    _checks.odd(_OP, "shift", shift)
    if _backend.takes_kernel(_OP, weights.device):
        return _fwd(weights, shift)
    return reference.circular_shift(weights, shift)
