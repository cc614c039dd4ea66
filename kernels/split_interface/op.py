"""The interface vector: checks, schema, autograd."""

from torch import Tensor

from ... import _backend, _checks
from .._op import register
from . import reference
from .reference import Interface, slot_width

__all__ = ["Interface", "split_interface"]

_OP = "split_interface"


def _reference(interface, read_heads, write_heads, shift_range):
    return reference.split_interface(interface, read_heads=read_heads, write_heads=write_heads, shift_range=shift_range)


def _fake(interface, read_heads, write_heads, shift_range):
    B, size = interface.shape
    H, S = read_heads + write_heads, 2 * shift_range + 1
    W = (size - H * (3 + S)) // (H + 2 * write_heads)
    shapes = (B, H, W), (B, H), (B, H), (B, H, S), (B, H), (B, write_heads, W), (B, write_heads, W)
    return tuple(interface.new_empty(s) for s in shapes)


_fwd = register(
    _OP,
    "Tensor interface, int read_heads, int write_heads, int shift_range",
    _reference,
    _fake,
    outputs=7,
    differentiable=("interface",),
)


def check_heads(op: str, read_heads: int, write_heads: int, shift_range: int) -> None:
    """Head counts and shift range of an interface vector."""
    _checks.whole(op, "read_heads", read_heads, 0)
    _checks.whole(op, "write_heads", write_heads, 0)
    _checks.whole(op, "shift_range", shift_range, 0)
    if read_heads + write_heads == 0:
        raise ValueError(f"memcore.{op}: 'read_heads' and 'write_heads' must not both be 0")


def split_interface(interface: Tensor, *, read_heads: int, write_heads: int, shift_range: int = 1) -> Interface:
    """Cut a controller's raw projection into head parameters and activate them (Graves et al. 2014, section 3).

    Head by head, read heads first: key (W), strength (1), gate (1), shift (2R + 1), gamma (1); write heads go on with erase (W)
    and add (W): I = H (W + 4 + 2R) + 2 W write_heads. Activations: strength softplus, gate sigmoid, shift softmax,
    gamma 1 + softplus, erase sigmoid, key and add none.

    Args:
        interface: [B, I]; the slot width W follows from I.
        read_heads, write_heads: not both 0.
        shift_range: R >= 0.

    Returns:
        Interface: key [B, H, W], strength, gate [B, H], shift [B, H, 2R + 1], gamma [B, H], erase, add [B, write_heads, W].
        Differentiable to any order.

    Raises:
        ValueError: wrong shape, head counts or an I from which W does not come out whole. TypeError: not floating.
    """
    (interface,) = _checks.common(_OP, ("interface", interface))
    check_heads(_OP, read_heads, write_heads, shift_range)
    _checks.dims(_OP, "interface", interface, "B, I")
    if slot_width(interface.shape[1], read_heads, write_heads, shift_range) is None:
        heads = read_heads + write_heads
        raise ValueError(
            f"memcore.{_OP}: 'interface' must have I = {heads + 2 * write_heads} W + {heads * (4 + 2 * shift_range)} numbers for a whole "
            f"slot width W ({read_heads} read heads, {write_heads} write heads, shift range {shift_range}), got I = {interface.shape[1]}"
        )
    if _backend.takes_kernel(_OP, interface.device):
        return Interface(*_fwd(interface, read_heads, write_heads, shift_range))
    return _reference(interface, read_heads, write_heads, shift_range)
