"""New characters from one drawing each.

Santoro, Bartunov, Botvinick, Wierstra, Lillicrap, "One-shot Learning with Memory-Augmented Neural Networks" (2016).
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import data
from .._checks import finite_number, whole
from ._base import Batch, Task

__all__ = ["OmniglotEpisodes"]

_LETTERS, _PLACES = 5, 5  # a string label is five letters of {a..e}
_STEPS = 100  # longest episode by default, that of the paper's 15 classes
_FINER = 1.4  # what is turned and shifted is stored finer by this factor: it then has the contrast of the test images


class OmniglotEpisodes(Task):
    """Episodes of drawings in random order, each step with the drawing and the *previous* step's label; due is this step's.

    An episode draws `classes` characters, `shots` drawings of each, and new labels: a class is learned from its own
    steps or not at all. In training a character turned by 90, 180 or 270 degrees is a class of its own (an episode holds
    a character in one position only), and every drawing is shifted and turned a little. The test episodes are of
    characters that training never sees, upright and as drawn.

    With one-hot labels target is [T, B] and the output `classes` logits. With string labels each class of an episode has
    a string of its own, five letters of {a..e}: target [T, B, 5], the label in the input and the output five groups of
    five; an answer is right only if all five letters are.

    Args:
        classes: classes of an episode (5 and 15 in the paper).
        shots: drawings of each class, at most 20.
        steps: length of an episode; a longer one is cut. By default classes x shots, at most 100.
        labels: "onehot" or "string".
        rotations: turned characters are new classes in training.
        shift: largest shift of a training drawing in pixels of the image, each direction uniform.
        angle: largest turn of a training drawing in degrees, uniform.
        size: side of an image in pixels.
        split, seed, root: of `memcore.data.omniglot`.

    `sample` takes `part`: "train" or "test". The accuracy is by instance: entry k - 1 over the steps that show a class for
    the k-th time. Without a leak the first cannot exceed `first_instance_ceiling` (45.7 % for five one-hot classes).

    Raises:
        memcore.data.DataNotFound, memcore.data.DataDamaged: without the drawings.
    """

    name = "omniglot"
    unit = "nats"

    def __init__(
        self,
        classes: int = 5,
        shots: int = 10,
        steps: int | None = None,
        labels: str = "onehot",
        rotations: bool = True,
        shift: float = 3.0,
        angle: float = 11.0,
        size: int = 20,
        split: str = "vinyals",
        seed: int = 0,
        root: str | os.PathLike | None = None,
    ) -> None:
        where = "tasks.omniglot"
        whole(where, "classes", classes, 2)
        whole(where, "shots", shots, 1)
        if shots > 20:
            raise ValueError(f"memcore.{where}: 'shots' must be at most 20, the drawings of a character, got {shots}")
        if labels not in ("onehot", "string"):
            raise ValueError(f"memcore.{where}: 'labels' must be 'onehot' or 'string', got {labels!r}")
        for option, value in (("shift", shift), ("angle", angle)):
            finite_number(where, option, value)
            if value < 0:
                raise ValueError(f"memcore.{where}: {option!r} must be at least 0, got {value}")
        if steps is None:
            steps = min(classes * shots, _STEPS)
        whole(where, "steps", steps, 1)
        if steps > classes * shots:
            raise ValueError(f"memcore.{where}: 'steps' must be at most classes x shots = {classes * shots}, got {steps}")
        self.drawings = data.omniglot(root, split=split, seed=seed, size=size)
        if classes > len(self.drawings.test):
            raise ValueError(f"memcore.{where}: 'classes' must be at most {len(self.drawings.test)}, got {classes}")

        self.classes, self.shots, self.steps, self.labels = classes, shots, steps, labels
        self.rotations, self.shift, self.angle, self.size = bool(rotations), float(shift), float(angle), size
        self.output_size = classes if labels == "onehot" else _LETTERS * _PLACES
        self.input_size = size * size + self.output_size
        answers = classes if labels == "onehot" else _LETTERS**_PLACES
        self.first_instance_ceiling = sum(1 / (answers - i) for i in range(classes)) / classes
        self.chance = 1 / answers
        self.guess = steps * math.log(answers)
        self.defaults = {
            "mann": {"memory_slots": 128, "slot_width": 40, "controller_size": 200, "read_heads": 4},
            "ntm": {"memory_slots": 128, "slot_width": 40, "controller_size": 200, "read_heads": 4, "write_heads": 4},
            "lstm": {"hidden_size": 200, "num_layers": 1},
            "paper": {"optimizer": "rmsprop", "lr": 1e-4, "decay": 0.95, "momentum": 0.9, "batch_size": 16},
            "cpu": {"optimizer": "adam", "lr": 1e-3, "batch_size": 16},
        }
        self.test_settings = {"test": {"part": "test"}}
        self._bank: dict[tuple[str, int], Tensor] = {}

    def describe(self) -> str:
        """One line for logs: the setting, the split and its source."""
        return (
            f"omniglot: {self.classes} classes x {self.shots} drawings, {self.steps} steps, {self.labels} labels, "
            f"split {self.drawings.split}, from {self.drawings.source}"
        )

    def _draw(self, batch_size: int, generator: torch.Generator | None, part: str = "train") -> Batch:
        if part not in ("train", "test"):
            raise ValueError(f"memcore.tasks.omniglot: 'part' must be 'train' or 'test', got {part!r}")
        augment = part == "train" and (self.rotations or self.shift > 0 or self.angle > 0)
        bank = self._images(part, min(round(self.size * _FINER), 105) if augment else self.size)
        classes, shots, episodes = self.classes, self.shots, torch.arange(batch_size).unsqueeze(1)
        character = torch.rand(batch_size, len(bank), generator=generator).topk(classes).indices  # [B, C]
        drawing = torch.rand(batch_size, classes, 20, generator=generator).argsort(-1)[..., :shots]
        order = torch.rand(batch_size, classes * shots, generator=generator).argsort(-1)[:, : self.steps]  # [B, T]
        slot = order // shots  # class of the episode at each step
        shown = character.gather(1, slot) * 20 + drawing.reshape(batch_size, -1).gather(1, order)
        images = bank.flatten(0, 1).index_select(0, shown.flatten())  # [B * T, side, side]
        if augment:
            quarter = torch.randint(0, 4 if self.rotations else 1, (batch_size, classes), generator=generator)
            images = self._moved(images, quarter.gather(1, slot).flatten(), generator)
        else:
            images = images.float().div_(255)
        images = images.view(batch_size, self.steps, -1)

        if self.labels == "onehot":
            label = torch.rand(batch_size, classes, generator=generator).argsort(-1)[episodes, slot]  # [B, T]
            code = F.one_hot(label, classes).float()
        else:
            strings = torch.rand(batch_size, _LETTERS**_PLACES, generator=generator).topk(classes).indices
            number = strings[episodes, slot].unsqueeze(-1)
            label = number // _LETTERS ** torch.arange(_PLACES) % _LETTERS  # [B, T, 5]
            code = F.one_hot(label, _LETTERS).float().flatten(2)
        previous = F.pad(code[:, :-1], (0, 0, 1, 0))
        return Batch(
            torch.cat([images, previous], -1).transpose(0, 1).contiguous(),
            label.transpose(0, 1).contiguous(),
            torch.ones(self.steps, batch_size),
        )

    def _images(self, part: str, side: int) -> Tensor:
        """[characters, 20, side, side] uint8 of the training or test characters."""
        if (part, side) not in self._bank:
            classes = self.drawings.train if part == "train" else self.drawings.test
            self._bank[part, side] = torch.from_numpy(self.drawings.at(side)[classes])
        return self._bank[part, side]

    def _moved(self, images: Tensor, quarter: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images [n, side, side] turned by quarter turns and a little more, and shifted: [n, size, size] in 0..1, bilinear."""
        n, size = len(images), self.size
        u = torch.rand(3, n, generator=generator) * 2 - 1
        turn = quarter * (torch.pi / 2) + u[0] * math.radians(self.angle)
        dx, dy = u[1:] * (2 * self.shift / size)
        at = (torch.arange(size) + 0.5) * (2 / size) - 1
        y, x = torch.meshgrid(at, at, indexing="ij")
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        # where each pixel looks: (cos x + sin y + dx, cos y - sin x + dy)
        basis = torch.stack([torch.stack(p, -1).flatten() for p in ((x, y), (y, -x), (one, zero), (zero, one))])
        grid = torch.stack([turn.cos(), turn.sin(), dx, dy], 1) @ basis
        source = images.float().unsqueeze(1)
        grid = grid.view(n, size, size, 2)
        return F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False).div_(255)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Nats per episode: cross-entropy (of five letters for string labels) summed over the steps, mean over B.

        Args:
            output: logits [T, B, O].
            batch: what `sample` gave.
        """
        self._check_output(output, batch)
        logits = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        groups = logits.reshape(-1, self.classes if self.labels == "onehot" else _LETTERS)
        return F.cross_entropy(groups, batch.target.reshape(-1), reduction="sum") / output.shape[1]

    @torch.no_grad()
    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float | list[float]]:
        """`nats` per episode; `accuracy` by instance, 1st to last shot (NaN where a cut episode shows none); `accuracy_all`."""
        nats = self.loss(output, batch).item()
        if self.labels == "onehot":
            right = output.argmax(-1) == batch.target
            same = batch.target.unsqueeze(1) == batch.target.unsqueeze(0)  # [T, T, B]
        else:
            right = (output.unflatten(-1, (_PLACES, _LETTERS)).argmax(-1) == batch.target).all(-1)
            same = (batch.target.unsqueeze(1) == batch.target.unsqueeze(0)).all(-1)
        now_and_before = torch.ones(len(right), len(right), dtype=torch.bool, device=right.device).tril().unsqueeze(-1)
        instance = (same & now_and_before).sum(1)  # [T, B], from 1
        by_instance = [right[instance == k].float().mean().item() for k in range(1, self.shots + 1)]
        return {"nats": nats, "accuracy": by_instance, "accuracy_all": right.float().mean().item()}
