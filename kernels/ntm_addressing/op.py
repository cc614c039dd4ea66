"""The NTM's addressing: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register_keeping
from . import reference

__all__ = ["ntm_addressing"]

_OP = "ntm_addressing"
_DIFFERENTIABLE = ("key", "memory", "strength", "gate", "shift", "gamma", "previous")


def _fake(key, memory, strength, gate, shift, gamma, previous):
    return previous.new_empty(previous.shape)


_fwd = register_keeping(
    _OP,
    ", ".join(f"Tensor {name}" for name in _DIFFERENTIABLE),
    reference.ntm_addressing,
    _fake,
    lambda key, memory, *_: (memory, key.shape[1]),
    differentiable=_DIFFERENTIABLE,
)


def ntm_addressing(
    key: Tensor, memory: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, gamma: Tensor, previous: Tensor
) -> Tensor:
    """A head's whole addressing (Graves et al. 2014, eq. 5-9), fused.

    sharpen(circular_shift(interpolate(content_addressing(key, memory, strength), previous, gate), shift), gamma)

    Args:
        key: [B, H, W]. memory: [B, N, W] or [N, W]. strength, gate, gamma: [B, H]. shift: [B, H, S], S odd.
        previous: [B, H, N] weights of the last step.

    Returns:
        [B, H, N]. Differentiable to any order in all arguments.

    Raises:
        ValueError: wrong shape or even S. TypeError: not floating. RuntimeError: devices differ.
    """
    args = _checks.common(
        _OP,
        ("key", key),
        ("memory", memory),
        ("strength", strength),
        ("gate", gate),
        ("shift", shift),
        ("gamma", gamma),
        ("previous", previous),
    )
    key, memory, strength, gate, shift, gamma, previous = args
    _checks.dims(_OP, "key", key, "B, H, W")
    _checks.dims(_OP, "memory", memory, "B, N, W", "N, W")
    _checks.dims(_OP, "shift", shift, "B, H, S")
    B, H, W = key.shape
    N = memory.shape[-2]
    if memory.dim() == 3:
        _checks.shape(_OP, "memory", memory, "B, N, W", (B, N, W), "key", key.shape)
    else:
        _checks.shape(_OP, "memory", memory, "N, W", (N, W), "key", key.shape)
    for name, t in (("strength", strength), ("gate", gate), ("gamma", gamma)):
        _checks.shape(_OP, name, t, "B, H", (B, H), "key", key.shape)
    _checks.shape(_OP, "shift", shift, "B, H, S", (B, H, shift.shape[-1]), "key", key.shape)
    _checks.odd(_OP, "shift", shift)
    _checks.shape(_OP, "previous", previous, "B, H, N", (B, H, N), "memory", memory.shape)
    if _backend.takes_kernel(_OP, key.device):
        return _fwd(*args)
    return reference.ntm_addressing(*args)
