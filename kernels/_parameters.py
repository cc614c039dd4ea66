"""The parameters of a whole recurrence: (weight, bias) of each controller layer, of the interface and of the output; checked, and as one vector.

A weight may come as a tuple of blocks of its rows, one below the other, so that nobody has to join them first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check", "tensors_of", "together", "vector"]


def _blocks(weight: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (weight,) if isinstance(weight, Tensor) else weight


def _pairs(parameters: Any) -> list:
    return [*parameters.layers, parameters.interface, parameters.output]


def tensors_of(parameters: Any) -> list[Tensor]:
    """All tensors, the blocks of each weight before its bias."""
    return [t for weight, bias in _pairs(parameters) for t in (*_blocks(weight), bias)]


def check(op: str, parameters: Any, tensors: Sequence[Tensor], expected: Sequence[tuple[int, ...]]) -> None:
    """`tensors`, those of `parameters`, have the shapes expected of each weight and bias in turn."""
    rest, sizes = iter(tensors), iter(expected)
    for i, (weight, _) in enumerate(_pairs(parameters)):
        parts, rows, bias = [next(rest) for _ in _blocks(weight)], next(sizes), next(sizes)
        shape = tuple(parts[0].shape) if len(parts) == 1 else _joined_shape(parts)
        for what, got, wanted in (("weight", shape, rows), ("bias", tuple(next(rest).shape), bias)):
            if got != wanted:
                owner = f"layers[{i}]" if i < len(parameters.layers) else ("interface", "output")[i - len(parameters.layers)]
                raise ValueError(f"memcore.{op}: {what} of 'parameters.{owner}' must have shape {wanted}, got {got}")


def _joined_shape(parts: Sequence[Tensor]) -> tuple[int, ...] | str:
    if parts and all(t.dim() == 2 and t.shape[1] == parts[0].shape[1] for t in parts):
        return sum(t.shape[0] for t in parts), parts[0].shape[1]
    return f"blocks of rows {[tuple(t.shape) for t in parts]}"


def together(parameters: Any, tensors: Sequence[Tensor], kind: Callable[..., Any]) -> Any:
    """The same as a `kind` whose weights are whole."""
    rest, pairs = iter(tensors), []
    for weight, _ in _pairs(parameters):
        parts = [next(rest) for _ in _blocks(weight)]
        pairs.append((parts[0] if len(parts) == 1 else torch.cat(parts), next(rest)))
    return kind(pairs[:-2], pairs[-2], pairs[-1])


class _Vector(torch.autograd.Function):
    """`torch.cat` of all tensors flattened, as one node of the graph instead of two a tensor."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.shapes = [t.shape for t in tensors]
        return torch.cat([t.reshape(-1) for t in tensors])

    @staticmethod
    def backward(ctx, grad):
        return tuple([g.view(s) for g, s in zip(grad.split([s.numel() for s in ctx.shapes]), ctx.shapes)])


_apply = super(torch.autograd.Function, _Vector).apply  # the bare one, as in _op.py


def vector(tensors: Sequence[Tensor]) -> Tensor:
    """All of them flattened, one after another."""
    if torch.compiler.is_compiling():
        return torch.cat([t.reshape(-1) for t in tensors])
    return _apply(*tensors)
