"""A whole NTM time step: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register_keeping
from ..split_interface.op import check_heads
from . import reference
from .reference import NTMStep

__all__ = ["NTMStep", "ntm_step"]

_OP = "ntm_step"
_ORDERS = ("write_read", "read_write")


def _reference(memory, interface, previous, read_heads, write_heads, shift_range, write_first):
    return reference.ntm_step(
        memory,
        interface,
        previous,
        read_heads=read_heads,
        write_heads=write_heads,
        shift_range=shift_range,
        order=_ORDERS[0 if write_first else 1],
    )


def _fake(memory, interface, previous, read_heads, write_heads, shift_range, write_first):
    B, _, W = memory.shape
    return memory.new_empty(memory.shape), memory.new_empty(B, read_heads, W), previous.new_empty(previous.shape)


_fwd = register_keeping(
    _OP,
    "Tensor memory, Tensor interface, Tensor previous, int read_heads, int write_heads, int shift_range, bool write_first",
    _reference,
    _fake,
    lambda memory, _, previous, *__: (memory, previous.shape[1]),
    outputs=3,
    differentiable=("memory", "interface", "previous"),
)


def ntm_step(
    memory: Tensor,
    interface: Tensor,
    previous: Tensor,
    *,
    read_heads: int,
    write_heads: int,
    shift_range: int = 1,
    order: str = "write_read",
) -> NTMStep:
    """One time step of a Neural Turing Machine's memory in ONE operator (Graves et al. 2014, eq. 2-9).

    x = split_interface(interface); weights = ntm_addressing(x.key, memory, x.strength, x.gate, x.shift, x.gamma, previous);
    memory' = erase_add_write(memory, weights of the write heads, x.erase, x.add); reads = read(memory', weights of the read heads).
    All heads address the memory that came in.

    Args:
        memory: [B, N, W].
        interface: [B, I], the controller's raw projection; its layout is that of `split_interface`.
        previous: [B, H, N] weights of the last step, read heads first; H = read_heads + write_heads.
        read_heads, write_heads: either may be 0, not both.
        shift_range: R; 2R + 1 shifts are allowed.
        order: "write_read" reads after the write (the paper's M_t), "read_write" before it.

    Returns:
        NTMStep(memory' [B, N, W], reads [B, read_heads, W], weights [B, H, N]). Differentiable to any order in the three tensors.
        Kept for the backward: the three inputs and, on the CPU, the similarities if they take at most an eighth of a large memory.

    Raises:
        ValueError: wrong shape, head counts or order. TypeError: not floating. RuntimeError: devices differ.
    """
    memory, interface, previous = _checks.common(_OP, ("memory", memory), ("interface", interface), ("previous", previous))
    check_heads(_OP, read_heads, write_heads, shift_range)
    _checks.dims(_OP, "memory", memory, "B, N, W")
    B, N, W = memory.shape
    H = read_heads + write_heads
    size = H * (W + 4 + 2 * shift_range) + 2 * W * write_heads
    _checks.shape(_OP, "interface", interface, "B, I", (B, size), "memory", memory.shape)
    _checks.shape(_OP, "previous", previous, "B, H, N", (B, H, N), "memory", memory.shape)
    if order not in _ORDERS:
        raise ValueError(f"memcore.{_OP}: 'order' must be 'write_read' or 'read_write', got {order!r}")
    if _backend.takes_kernel(_OP, memory.device):
        return NTMStep(*_fwd(memory, interface, previous, read_heads, write_heads, shift_range, order == _ORDERS[0]))
    return reference.ntm_step(
        memory,
        interface,
        previous,
        read_heads=read_heads,
        write_heads=write_heads,
        shift_range=shift_range,
        order=order,
    )
