"""Optimizers that touch the rows of a store that were used, and no others.

`update` gets rows [U, W], gradients, states and the number of each row's step [U, 1] (1 is its first), and returns rows and states.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

__all__ = ["OPTIMIZERS", "Adam", "RMSProp", "RowOptimizer", "SGD", "as_optimizer"]


@dataclass(frozen=True)
class SGD:
    """row - lr * gradient."""

    state: ClassVar[tuple[str, ...]] = ()

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], step: Tensor, lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        return rows - lr * grad, {}


@dataclass(frozen=True)
class RMSProp:
    """row - lr * gradient / (sqrt(s) + eps), s = alpha s + (1 - alpha) gradient^2; as torch.optim.RMSprop."""

    alpha: float = 0.99
    eps: float = 1e-8
    state: ClassVar[tuple[str, ...]] = ("square_avg",)

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], step: Tensor, lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        square = self.alpha * state["square_avg"] + (1 - self.alpha) * grad * grad
        return rows - lr * grad / (square.sqrt() + self.eps), {"square_avg": square}


@dataclass(frozen=True)
class Adam:
    """Adam whose bias correction counts a row's own steps; as torch.optim.SparseAdam for rows used at every step."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], step: Tensor, lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        mean = b1 * state["exp_avg"] + (1 - b1) * grad
        square = b2 * state["exp_avg_sq"] + (1 - b2) * grad * grad
        scale = ((1 - b2**step).sqrt() / (1 - b1**step)).to(rows.dtype)
        return rows - lr * scale * mean / (square.sqrt() + self.eps), {"exp_avg": mean, "exp_avg_sq": square}


RowOptimizer = SGD | RMSProp | Adam
OPTIMIZERS: dict[str, type[RowOptimizer]] = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam}


def as_optimizer(op: str, given: str | RowOptimizer) -> RowOptimizer:
    if isinstance(given, RowOptimizer):
        return given
    if given not in OPTIMIZERS:
        raise ValueError(f"memcore.{op}: 'optimizer' must be one of {', '.join(OPTIMIZERS)}, or an SGD, RMSProp or Adam of settings, got {given!r}")
    return OPTIMIZERS[given]()
