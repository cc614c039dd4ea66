"""Content addressing in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["content_addressing"]

EPS = 1e-8


def content_addressing(
    key: Tensor, memory: Tensor, strength: Tensor | None = None, *, similarity: str = "cosine", mask: Tensor | None = None
) -> Tensor:
    """w[b,h,n] = softmax over n of strength[b,h] * sim(key[b,h], memory[b,n]); see memcore.functional.content_addressing."""
    with no_autocast(key):
        k, m = accumulate(key), accumulate(memory)
        if memory.dim() == 2:
            m = m.expand(key.shape[0], -1, -1)
        beta = torch.ones_like(k[..., 0]) if strength is None else accumulate(strength)
        if mask is not None:
            usable = mask.any(-1)  # [B]
            m = torch.where(mask[..., None], m, 0)
            k = torch.where(usable[:, None, None], k, 0)
            beta = torch.where(usable[:, None], beta, 0)
        # A product summed row by row, not a matmul: identical rows must have bitwise equal similarity.
        sim = (k[:, :, None] * m[:, None]).sum(-1)  # [B, H, N]
        if similarity == "cosine":
            sim = _cosine(sim, k, m)
        if sim.shape[-1] == 0:
            return sim.to(key.dtype)
        beta = beta[..., None]
        return _softmax(beta, sim, None if mask is None else mask[:, None]).to(key.dtype)


def _cosine(dot: Tensor, k: Tensor, m: Tensor) -> Tensor:
    k2, m2 = (k * k).sum(-1)[:, :, None], (m * m).sum(-1)[:, None]
    zero = (k2 == 0) | (m2 == 0)
    norm_k = torch.where(k2 == 0, 1, k2).sqrt().clamp_min(EPS)
    norm_m = torch.where(m2 == 0, 1, m2).sqrt().clamp_min(EPS)
    return torch.where(zero, 0, dot / (norm_k * norm_m))


def _softmax(beta: Tensor, sim: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(beta * (sim - extreme)): the winners' score is exactly 0, whatever beta is."""
    s = sim.detach()
    hidden = None if mask is None else ~mask
    top = s if hidden is None else s.masked_fill(hidden, -torch.inf)
    low = s if hidden is None else s.masked_fill(hidden, torch.inf)
    extreme = torch.where(beta >= 0, top.amax(-1, keepdim=True), low.amin(-1, keepdim=True)).detach()
    if hidden is not None:
        extreme = torch.where(mask.any(-1, keepdim=True), extreme, 0)
    score = beta * (sim - extreme)
    if hidden is not None:
        score = score.masked_fill(hidden, -torch.inf)
    e = score.exp()
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1, total)
