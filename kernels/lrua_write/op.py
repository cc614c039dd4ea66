"""Least-recently-used access: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference

__all__ = ["lrua_write"]

_OP = "lrua_write"


def _reference(memory, word, previous_read, usage, gate, zero):
    return reference.lrua_write(memory, word, previous_read, usage, gate, zero="least_used" if zero else None)


def _fake(memory, word, previous_read, usage, gate, zero):
    return memory.new_empty(memory.shape), previous_read.new_empty(previous_read.shape)


_fwd = register(
    _OP,
    "Tensor memory, Tensor word, Tensor previous_read, Tensor usage, Tensor gate, bool zero",
    _reference,
    _fake,
    outputs=2,
    differentiable=("memory", "word", "previous_read", "gate"),
)


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
    """Write to the least-used slot or to the slots last read (Santoro et al. 2016, LRUA), fused.

    With l the least-used slot (lowest index on a tie, NaN usage counts as most used), shared by all heads:

    write_weights[b,h] = gate[b,h] * previous_read[b,h] + (1 - gate[b,h]) * onehot(l)
    memory'[b] = memory[b] with row l set to 0, + sum over h of write_weights[b,h] word[b,h]^T, where word is `add` or the key

    Args:
        memory: [B, N, W]. key: [B, H, W]. previous_read: [B, H, N] read weights of the last step. usage: [B, N].
        gate: [B, H] in [0, 1].
        zero: "least_used" zeroes slot l before the write, None does not.
        add: [B, H, W], what is written instead of the key.

    Returns:
        (memory' [B, N, W], write_weights [B, H, N]); N = 0 writes nothing. Differentiable to any order in memory, the
        word, previous_read and gate, not in usage.

    Raises:
        ValueError: wrong shape or zero. TypeError: not floating. RuntimeError: devices differ.
    """
    memory, key, previous_read, usage, gate, add = _checks.common(
        _OP,
        ("memory", memory),
        ("key", key),
        ("previous_read", previous_read),
        ("usage", usage),
        ("gate", gate),
        ("add", add),
    )
    _checks.dims(_OP, "memory", memory, "B, N, W")
    _checks.dims(_OP, "key", key, "B, H, W")
    B, N, W = memory.shape
    H = key.shape[1]
    _checks.shape(_OP, "key", key, "B, H, W", (B, H, W), "memory", memory.shape)
    _checks.shape(_OP, "previous_read", previous_read, "B, H, N", (B, H, N), "memory", memory.shape)
    _checks.shape(_OP, "usage", usage, "B, N", (B, N), "memory", memory.shape)
    _checks.shape(_OP, "gate", gate, "B, H", (B, H), "memory", memory.shape)
    if add is not None:
        _checks.shape(_OP, "add", add, "B, H, W", (B, H, W), "memory", memory.shape)
    if zero not in ("least_used", None):
        raise ValueError(f"memcore.{_OP}: 'zero' must be 'least_used' or None, got {zero!r}")
    word = key if add is None else add
    if _backend.takes_kernel(_OP, memory.device):
        return _fwd(memory, word, previous_read, usage, gate, zero is not None)
    return reference.lrua_write(memory, word, previous_read, usage, gate, zero=zero)
