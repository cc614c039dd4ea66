"""Reads: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference

__all__ = ["read"]

_OP = "read"
_fwd = register(
    _OP,
    "Tensor memory, Tensor weights",
    reference.read,
    lambda memory, weights: memory.new_empty(weights.shape[0], weights.shape[1], memory.shape[-1]),
    differentiable=("memory", "weights"),
)


def read(memory: Tensor, weights: Tensor) -> Tensor:
    """Read vectors: the slots' mean under each head's weights (Graves et al. 2014, eq. 2).

    r[b,h,w] = sum over n of weights[b,h,n] * memory[b,n,w]

    Args:
        memory: [B, N, W], or [N, W] shared by the batch.
        weights: [B, H, N] read weights.

    Returns:
        [B, H, W]. Differentiable to any order in both arguments.

    Raises:
        ValueError: wrong shape. TypeError: not floating. RuntimeError: devices differ.
    """
    memory, weights = _checks.common(_OP, ("memory", memory), ("weights", weights))
    _checks.dims(_OP, "memory", memory, "B, N, W", "N, W")
    _checks.dims(_OP, "weights", weights, "B, H, N")
    B = memory.shape[0] if memory.dim() == 3 else weights.shape[0]
    _checks.shape(_OP, "weights", weights, "B, H, N", (B, weights.shape[1], memory.shape[-2]), "memory", memory.shape)
    if _backend.takes_kernel(_OP, memory.device):
        return _fwd(memory, weights)
    return reference.read(memory, weights)
