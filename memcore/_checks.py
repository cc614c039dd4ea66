"""Argument errors in one voice: `memcore.<op>: '<argument>' must ..., got ...`."""

import math
from typing import NoReturn

import torch
from torch import Tensor

__all__ = ["common", "dims", "odd", "shape", "whole"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def common(op: str, *named: tuple[str, Tensor | None]) -> list[Tensor | None]:
    """Floating tensors on one device, promoted to their common dtype; None passes through.

    Raises:
        TypeError: for anything but a floating tensor.
        RuntimeError: for tensors on different devices.
    """
    first = named[0][1]
    if isinstance(first, Tensor) and first.dtype in _FLOATS:
        dtype, device = first.dtype, first.device
        for _, t in named[1:]:
            if t is not None and not (isinstance(t, Tensor) and t.dtype is dtype and t.device == device):
                break
        else:
            return [t for _, t in named]
    return _promoted(op, named)


def _promoted(op: str, named: tuple[tuple[str, Tensor | None], ...]) -> list[Tensor | None]:
    first_name, first = named[0]
    dtype = None
    for name, t in named:
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"memcore.{op}: {name!r} must be a tensor, got {type(t).__name__}")
        if t.dtype not in _FLOATS:
            raise TypeError(f"memcore.{op}: {name!r} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        if t.device != first.device:
            raise RuntimeError(f"memcore.{op}: {name!r} must be on the device of {first_name!r} ({first.device}), got {t.device}")
        dtype = t.dtype if dtype is None else torch.promote_types(dtype, t.dtype)
    return [None if t is None else t.to(dtype) for _, t in named]


def dims(op: str, name: str, t: Tensor, symbols: str, *also: str) -> None:
    """`t` has as many dimensions as `symbols` (or one of `also`) names."""
    if t.dim() != symbols.count(",") + 1 and t.dim() not in {s.count(",") + 1 for s in also}:
        forms = " or ".join(f"({s})" for s in (symbols, *also))
        raise ValueError(f"memcore.{op}: {name!r} must have shape {forms}, got {tuple(t.shape)}")


def shape(op: str, name: str, t: Tensor, symbols: str, sizes: tuple, anchor: str, anchor_shape: tuple) -> None:
    """`t` has exactly the shape that the tensors before it imply."""
    if t.shape != sizes:
        _wrong_shape(op, name, t, symbols, sizes, anchor, anchor_shape)


def _wrong_shape(op: str, name: str, t: Tensor, symbols: str, sizes: tuple, anchor: str, anchor_shape: tuple) -> NoReturn:
    raise ValueError(
        f"memcore.{op}: {name!r} must have shape ({symbols}) = {tuple(sizes)} to match {anchor!r} {tuple(anchor_shape)}, "
        f"got {tuple(t.shape)}"
    )


def odd(op: str, name: str, t: Tensor) -> None:
    """The last dimension, the number of shifts S = 2R + 1, is odd."""
    if t.shape[-1] % 2 == 0:
        raise ValueError(f"memcore.{op}: {name!r} must have an odd number of shifts S = 2R + 1, got S = {t.shape[-1]}")


def whole(op: str, name: str, value: int, least: int) -> None:
    """`value` is an int (not a bool) of at least `least`."""
    if type(value) is int and value >= least:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"memcore.{op}: {name!r} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"memcore.{op}: {name!r} must be at least {least}, got {value}")


def finite_number(op: str, name: str, value: float) -> None:
    """`value` is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"memcore.{op}: {name!r} must be a number, got {type(value).__name__}")
    if isinstance(value, (int, float)) and not -math.inf < value < math.inf:  # math.isfinite breaks a compiled graph
        raise ValueError(f"memcore.{op}: {name!r} must be finite, got {value}")
