"""Erase/add writes: checks, schema, autograd."""

import torch
from torch import Tensor

from ... import _backend, _checks
from .. import _cuda
from .._op import library, register
from . import reference

__all__ = ["erase_add_write", "erase_add_write_"]

_OP = "erase_add_write"
_fwd = register(
    _OP,
    "Tensor memory, Tensor weights, Tensor erase, Tensor add",
    reference.erase_add_write,
    lambda memory, weights, erase, add: memory.new_empty(memory.shape),
    differentiable=("memory", "weights", "erase", "add"),
)


def _in_place(memory, weights, erase, add):
    memory.copy_(reference.erase_add_write(memory, weights, erase, add))


def _bump_version(keys, memory, weights, erase, add):
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _write_(memory, weights, erase, add)
    torch.autograd.graph.increment_version(memory)


_IN_PLACE = "Tensor(a!) memory, Tensor weights, Tensor erase, Tensor add"
library.define(f"erase_add_write_({_IN_PLACE}) -> ()")
library.impl("erase_add_write_", _in_place, "CompositeExplicitAutograd")
_cuda.implement(library, "erase_add_write_", _IN_PLACE, "()", _in_place)
library.impl("erase_add_write_", _bump_version, "ADInplaceOrView", with_keyset=True)
torch.library.register_fake("memcore::erase_add_write_", lambda memory, weights, erase, add: None, lib=library)
_write_ = torch.ops.memcore.erase_add_write_.default


def _checked(op: str, memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> list[Tensor]:
    args = _checks.common(op, ("memory", memory), ("weights", weights), ("erase", erase), ("add", add))
    _checks.dims(op, "memory", memory, "B, N, W")
    _checks.dims(op, "weights", weights, "B, H, N")
    B, N, W = memory.shape
    H = weights.shape[1]
    _checks.shape(op, "weights", weights, "B, H, N", (B, H, N), "memory", memory.shape)
    _checks.shape(op, "erase", erase, "B, H, W", (B, H, W), "memory", memory.shape)
    _checks.shape(op, "add", add, "B, H, W", (B, H, W), "memory", memory.shape)
    return args


def erase_add_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Write to memory: all erasures, then all additions (Graves et al. 2014, eq. 3-4).

    memory'[b,n,w] = memory[b,n,w] * prod over h of (1 - weights[b,h,n] * erase[b,h,w]) + sum over h of weights[b,h,n] * add[b,h,w]

    Args:
        memory: [B, N, W].
        weights: [B, H, N] write weights.
        erase: [B, H, W] in [0, 1].
        add: [B, H, W].

    Returns:
        [B, N, W], a new tensor. Differentiable to any order in all arguments.

    Raises:
        ValueError: wrong shape. TypeError: not floating. RuntimeError: devices differ.
    """
    args = _checked(_OP, memory, weights, erase, add)
    if _backend.takes_kernel(_OP, args[0].device):
        return _fwd(*args)
    return reference.erase_add_write(*args)


def erase_add_write_(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """`erase_add_write` into `memory` itself, keeping its dtype; returns `memory`.

    For inference and for callers who manage the graph. Where a gradient is wanted it is right, at the price of one copy
    of the memory for the backward.

    Args, shapes and errors are those of `erase_add_write`; also

    Raises:
        RuntimeError: memory with elements that share storage (expanded), or a leaf that requires grad while grad mode is on.
    """
    op = "erase_add_write_"
    wide, *rest = _checked(op, memory, weights, erase, add)
    if any(s == 0 and n > 1 for n, s in zip(memory.shape, memory.stride())) and memory.numel():
        raise RuntimeError(
            f"memcore.{op}: 'memory' must not have elements that share storage, got strides {memory.stride()} "
            f"for shape {tuple(memory.shape)}; call .clone() first"
        )
    kernel = _backend.takes_kernel(_OP, memory.device)
    tracked = torch.is_grad_enabled() and (memory.requires_grad or any(t.requires_grad for t in rest))
    if kernel and not tracked and wide is memory:
        _write_(memory, *rest)
        return memory
    if tracked and wide is memory:
        wide = memory.clone()  # the backward needs the memory as it was
    return memory.copy_((_fwd if kernel else reference.erase_add_write)(wide, *rest))
