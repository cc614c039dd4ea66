"""Usage of the slots: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference

__all__ = ["usage_update"]

_OP = "usage_update"
_fwd = register(
    _OP,
    "Tensor usage, Tensor read_weights, Tensor write_weights, float decay",
    reference.usage_update,
    lambda usage, read_weights, write_weights, decay: usage.new_empty(usage.shape),
    differentiable=("usage", "read_weights", "write_weights"),
)


def usage_update(usage: Tensor, read_weights: Tensor, write_weights: Tensor, decay: float) -> Tensor:
    """Decayed count of how much each slot was read and written (the usage weights of Santoro et al. 2016).

    usage'[b,n] = decay * usage[b,n] + sum over h of read_weights[b,h,n] + sum over h of write_weights[b,h,n]

    Args:
        usage: [B, N]. read_weights: [B, Hr, N]. write_weights: [B, Hw, N]. decay: a finite number, usually 0.95 to 0.99.

    Returns:
        [B, N]. Differentiable to any order in the three tensors.

    Raises:
        ValueError: wrong shape or a decay that is not finite. TypeError: not floating. RuntimeError: devices differ.
    """
    usage, read_weights, write_weights = _checks.common(
        _OP, ("usage", usage), ("read_weights", read_weights), ("write_weights", write_weights)
    )
    _checks.dims(_OP, "usage", usage, "B, N")
    _checks.dims(_OP, "read_weights", read_weights, "B, Hr, N")
    _checks.dims(_OP, "write_weights", write_weights, "B, Hw, N")
    B, N = usage.shape
    _checks.shape(_OP, "read_weights", read_weights, "B, Hr, N", (B, read_weights.shape[1], N), "usage", usage.shape)
    _checks.shape(_OP, "write_weights", write_weights, "B, Hw, N", (B, write_weights.shape[1], N), "usage", usage.shape)
    _checks.finite_number(_OP, "decay", decay)
    if _backend.takes_kernel(_OP, usage.device):
        return _fwd(usage, read_weights, write_weights, decay)
    return reference.usage_update(usage, read_weights, write_weights, decay)
