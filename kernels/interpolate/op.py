"""Interpolation: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference

__all__ = ["interpolate"]

_OP = "interpolate"
_fwd = register(
    _OP,
    "Tensor content, Tensor previous, Tensor gate",
    reference.interpolate,
    lambda content, previous, gate: content.new_empty(content.shape),
    differentiable=("content", "previous", "gate"),
)


def interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """Blend content weights with the previous step's weights (Graves et al. 2014, eq. 7).

    w[b,h,n] = gate[b,h] * content[b,h,n] + (1 - gate[b,h]) * previous[b,h,n]; a gate of 0 or 1 passes finite weights
    on bit for bit.

    Args:
        content: [B, H, N] weights by content.
        previous: [B, H, N] weights of the last step.
        gate: [B, H] in [0, 1].

    Returns:
        [B, H, N]. Differentiable to any order in all arguments.

    Raises:
        ValueError: wrong shape. TypeError: not floating. RuntimeError: devices differ.
    """
    content, previous, gate = _checks.common(_OP, ("content", content), ("previous", previous), ("gate", gate))
    _checks.dims(_OP, "content", content, "B, H, N")
    B, H, N = content.shape
    _checks.shape(_OP, "previous", previous, "B, H, N", (B, H, N), "content", content.shape)
    _checks.shape(_OP, "gate", gate, "B, H", (B, H), "content", content.shape)
    if _backend.takes_kernel(_OP, content.device):
        return _fwd(content, previous, gate)
    return reference.interpolate(content, previous, gate)
