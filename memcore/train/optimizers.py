"""The optimizers of the papers, by name."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["OPTIMIZERS", "GravesRMSProp", "make_optimizer"]


class GravesRMSProp(torch.optim.Optimizer):
    """RMSProp as in Graves, Generating Sequences With Recurrent Neural Networks (2013), equations 38-45, used by the NTM paper.

    Centred, with momentum, and the damping inside the root (`torch.optim.RMSprop` adds it outside):

        n <- a n + (1 - a) g^2,   m <- a m + (1 - a) g,   d <- b d - lr g / sqrt(n - m^2 + eps),   p <- p + d

    Args:
        lr: step size.
        decay: a.
        momentum: b.
        eps: damping.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        decay: float = 0.95,
        momentum: float = 0.9,
        eps: float = 1e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    for key in ("square", "mean", "delta"):
                        self.state[p][key] = torch.zeros_like(p)
            square, mean, delta = ([self.state[p][key] for p in params] for key in ("square", "mean", "delta"))
            a = group["decay"]
            torch._foreach_mul_(square, a)
            torch._foreach_addcmul_(square, grads, grads, 1 - a)
            torch._foreach_lerp_(mean, grads, 1 - a)
            root = torch._foreach_addcmul(square, mean, mean, -1.0)
            torch._foreach_clamp_min_(root, 0.0)  # n - m^2 may round below zero
            torch._foreach_add_(root, group["eps"])
            torch._foreach_sqrt_(root)
            torch._foreach_mul_(delta, group["momentum"])
            torch._foreach_addcdiv_(delta, grads, root, -group["lr"])
            torch._foreach_add_(params, delta)
        return loss


OPTIMIZERS = ("adam", "rmsprop")


def make_optimizer(name: str, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """`adam` (betas .9, .999) or `rmsprop` (`GravesRMSProp`: centred, decay .95, momentum .9)."""
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, fused=True)
    if name == "rmsprop":
        return GravesRMSProp(params, lr=lr)
    raise ValueError(f"memcore.train: 'optimizer' must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
