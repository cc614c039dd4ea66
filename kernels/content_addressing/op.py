"""Content addressing: checks, schema, autograd."""

import torch
from torch import Tensor

from ... import _backend, _checks
from .._op import register_keeping
from . import reference

__all__ = ["content_addressing"]

_OP = "content_addressing"


def _reference(key, memory, strength, mask, cosine):
    return reference.content_addressing(key, memory, strength, similarity="cosine" if cosine else "dot", mask=mask)


def _fake(key, memory, strength, mask, cosine):
    return key.new_empty(key.shape[0], key.shape[1], memory.shape[-2])


_fwd = register_keeping(
    _OP,
    "Tensor key, Tensor memory, Tensor? strength, Tensor? mask, bool cosine",
    _reference,
    _fake,
    lambda key, memory, *_: (memory, key.shape[1]),
    differentiable=("key", "memory", "strength"),
)


def content_addressing(
    key: Tensor, memory: Tensor, strength: Tensor | None = None, *, similarity: str = "cosine", mask: Tensor | None = None
) -> Tensor:
    """Weights over memory slots by similarity to a key (Graves et al. 2014, eq. 5-6).

    w[b,h,n] = softmax over n of strength[b,h] * sim(key[b,h], memory[b,n]), with
    cosine(k, m) = k.m / (max(|k|, 1e-8) max(|m|, 1e-8)); exactly 0, with gradient 0, where k or m is zero.

    Args:
        key: [B, H, W], one key a head.
        memory: [B, N, W], or [N, W] shared by the batch.
        strength: [B, H], the key strength (an inverse temperature of any sign); None is 1.
        similarity: "cosine" or "dot".
        mask: [B, N] bool, True = usable. Masked slots get weight 0 and may hold anything; a row with no usable slot is all 0.

    Returns:
        [B, H, N]; each row sums to 1. Differentiable to any order in key, memory and strength.

    Raises:
        ValueError: wrong shape or similarity. TypeError: not floating, or a mask that is not bool. RuntimeError: devices differ.

    Example:
        >>> import torch, memcore
        >>> memory = torch.eye(3)[None]
        >>> memcore.functional.content_addressing(memory[:, :1], memory, torch.full((1, 1), 100.0))
        tensor([[[1., 0., 0.]]])
    """
    key, memory, strength = _checks.common(_OP, ("key", key), ("memory", memory), ("strength", strength))
    _checks.dims(_OP, "key", key, "B, H, W")
    _checks.dims(_OP, "memory", memory, "B, N, W", "N, W")
    B, H, W = key.shape
    N = memory.shape[-2]
    if memory.dim() == 3:
        _checks.shape(_OP, "memory", memory, "B, N, W", (B, N, W), "key", key.shape)
    else:
        _checks.shape(_OP, "memory", memory, "N, W", (N, W), "key", key.shape)
    if strength is not None:
        _checks.shape(_OP, "strength", strength, "B, H", (B, H), "key", key.shape)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"memcore.{_OP}: 'mask' must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.device != key.device:
            raise RuntimeError(f"memcore.{_OP}: 'mask' must be on the device of 'key' ({key.device}), got {mask.device}")
        _checks.shape(_OP, "mask", mask, "B, N", (B, N), "memory", memory.shape)
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"memcore.{_OP}: 'similarity' must be 'cosine' or 'dot', got {similarity!r}")
    if _backend.takes_kernel(_OP, key.device):
        return _fwd(key, memory, strength, mask, similarity == "cosine")
    return reference.content_addressing(key, memory, strength, similarity=similarity, mask=mask)
