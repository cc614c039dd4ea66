"""The interface vector in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._op import accumulate, no_autocast

__all__ = ["Interface", "slot_width", "split_interface"]


class Interface(NamedTuple):
    """The activated pieces of an interface vector, all heads, read heads first."""

    key: Tensor
    """[B, H, W]"""
    strength: Tensor
    """[B, H], softplus"""
    gate: Tensor
    """[B, H], sigmoid"""
    shift: Tensor
    """[B, H, 2R + 1], softmax"""
    gamma: Tensor
    """[B, H], 1 + softplus"""
    erase: Tensor
    """[B, Hw, W], sigmoid"""
    add: Tensor
    """[B, Hw, W]"""


def slot_width(size: int, read_heads: int, write_heads: int, shift_range: int) -> int | None:
    """The slot width W of an interface vector of `size` numbers, or None if it does not come out whole."""
    heads = read_heads + write_heads
    rest = size - heads * (4 + 2 * shift_range)
    width = rest // (heads + 2 * write_heads)
    return width if rest >= 0 and width * (heads + 2 * write_heads) == rest else None


def split_interface(interface: Tensor, *, read_heads: int, write_heads: int, shift_range: int = 1) -> Interface:
    """Cut head by head and activate; see memcore.functional.split_interface."""
    with no_autocast(interface):
        B, size = interface.shape
        W = slot_width(size, read_heads, write_heads, shift_range)
        S = 2 * shift_range + 1
        head = W + 3 + S
        x = accumulate(interface)
        reads = x[:, : read_heads * head].reshape(B, read_heads, head)
        writes = x[:, read_heads * head :].reshape(B, write_heads, head + 2 * W)
        every = torch.cat([reads, writes[..., :head]], 1)
        key, strength, gate, shift, gamma = every.split([W, 1, 1, S, 1], -1)
        _, erase, add = writes.split([head, W, W], -1)
        pieces = (
            key,
            F.softplus(strength[..., 0]),
            gate[..., 0].sigmoid(),
            shift.softmax(-1),
            1 + F.softplus(gamma[..., 0]),
            erase.sigmoid(),
            add.clone(),  # else a view of the interface
        )
        return Interface(*(p.to(interface.dtype) for p in pieces))
