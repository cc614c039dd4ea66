"""A whole NTM time step in plain PyTorch."""

from typing import NamedTuple

from torch import Tensor

from .._op import accumulate
from ..erase_add_write.reference import erase_add_write
from ..ntm_addressing.reference import ntm_addressing
from ..read.reference import read
from ..split_interface.reference import split_interface

__all__ = ["NTMStep", "ntm_step"]


class NTMStep(NamedTuple):
    """What one time step leaves behind."""

    memory: Tensor
    """[B, N, W]"""
    reads: Tensor
    """[B, R, W]"""
    weights: Tensor
    """[B, H, N], read heads first"""


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
    """Activations, addressing, write and reads of one step; see memcore.functional.ntm_step."""
    m, w = accumulate(memory), accumulate(previous)
    x = split_interface(accumulate(interface), read_heads=read_heads, write_heads=write_heads, shift_range=shift_range)
    weights = ntm_addressing(x.key, m, x.strength, x.gate, x.shift, x.gamma, w)
    written = erase_add_write(m, weights[:, read_heads:], x.erase, x.add)
    reads = read(written if order == "write_read" else m, weights[:, :read_heads])
    return NTMStep(written.to(memory.dtype), reads.to(memory.dtype), weights.to(memory.dtype))
