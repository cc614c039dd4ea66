"""What every task shares: the batch, the checks of its options, the cost in bits and the rates of wrong bits."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import whole

__all__ = ["Batch", "BitTask", "Task", "known_options"]


class Batch(NamedTuple):
    """One batch of sequences, time first."""

    input: Tensor  # [T, B, X] float32
    target: Tensor  # bits [T, B, O] float32, or class numbers [T, B] or [T, B, L] int64; 0 where no answer is due
    mask: Tensor  # [T, B] float32, 1 where an answer is due
    lengths: Tensor | None = None  # [B] int64 if the sequences differ in length

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(None if t is None else t.to(device) for t in self))


def known_options(owner: str, what: str, function: Callable, given: Iterable[str], skip: int = 0) -> None:
    """Raise ValueError unless every name in `given` is a parameter of `function` after the first `skip`."""
    known = list(inspect.signature(function).parameters)[skip:]
    for name in given:
        if name not in known:
            raise ValueError(f"memcore.{owner}: unknown {what} {name!r}; known: {', '.join(known) or 'none'}")


class Task:
    """Base of the tasks: `sample`, `loss` and `metrics` over batches that a seeded generator fixes.

    Attributes:
        name: the name in `memcore.tasks.make`.
        input_size, output_size: X and O of the batches and of the logits a model must give, [T, B, O].
        defaults: settings by name. "ntm", "ntm-feedforward", "mann" and "lstm" hold keyword arguments of the models,
            "paper" the optimiser and batch of the paper, "cpu" those that suit a run on two CPU cores.
        optimum: the least expected cost of one sequence where it is known, else None.
        guess: the expected cost of one sequence without a memory, where it is known, else None.
        test_settings: overrides of `sample` by name, the settings a trained model is tested at.
    """

    name: str
    input_size: int
    output_size: int
    defaults: dict[str, dict[str, Any]]
    optimum: float | None = None
    guess: float | None = None
    test_settings: dict[str, dict[str, Any]]
    unit: ClassVar[str] = "bits"

    def sample(self, batch_size: int, *, generator: torch.Generator | None = None, **overrides: Any) -> Batch:
        """Draw `batch_size` sequences of the training distribution, or of what `overrides` fix.

        The draw depends on `generator` alone (torch's global one if None) and is made on the CPU: `Batch.to` moves it.

        Raises:
            ValueError: for an unknown override or a size out of range; TypeError for one of another type.
        """
        where = f"tasks.{self.name}"
        whole(where, "batch_size", batch_size, 1)
        if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != "cpu"):
            raise TypeError(f"memcore.{where}: 'generator' must be a CPU torch.Generator or None, got {generator!r}")
        known_options(where, "override", self._draw, overrides, skip=2)
        return self._draw(batch_size, generator, **overrides)

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        raise NotImplementedError

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch of the cost of one sequence, in `unit`."""
        raise NotImplementedError

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float | list[float]]:
        """Figures of merit of `output` on `batch`, by name."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for logs: name, sizes and what else fixes the draw."""
        return f"{self.name}: {self.input_size} inputs, {self.output_size} outputs"

    def _check_output(self, output: Tensor, batch: Batch) -> None:
        expected = (*batch.mask.shape, self.output_size)
        if output.shape != expected:
            raise ValueError(
                f"memcore.tasks.{self.name}: 'output' must have shape (T, B, O) = {expected}, got {tuple(output.shape)}"
            )


class BitTask(Task):
    """A task whose answers are bits, scored by binary cross-entropy."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Bits per sequence: the binary cross-entropies of the answer phase, summed, divided by ln 2, mean over B.

        Args:
            output: logits [T, B, O] of a 1.
            batch: what `sample` gave.
        """
        self._check_output(output, batch)
        nats = F.binary_cross_entropy_with_logits(
            output.float() if output.dtype in (torch.float16, torch.bfloat16) else output,
            batch.target.to(output.dtype),
            reduction="none",
        )
        return (nats.sum(-1) * batch.mask).sum() / (math.log(2) * output.shape[1])

    @torch.no_grad()
    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float]:
        """`bits` per sequence, `wrong_bits` (rate over the answer bits, threshold 0), `sequences_wrong` (rate)."""
        bits = self.loss(output, batch)
        wrong = ((output > 0) != (batch.target > 0.5)).sum(-1) * batch.mask  # [T, B]
        return {
            "bits": bits.item(),
            "wrong_bits": (wrong.sum() / (batch.mask.sum() * self.output_size)).item(),
            "sequences_wrong": (wrong.sum(0) > 0).float().mean().item(),
        }
