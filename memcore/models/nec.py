"""Neural Episodic Control (Pritzel et al. 2017): an encoder and a differentiable neural dictionary for each action."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from ..stores import DND
from ._recurrent import one_of

__all__ = ["NEC", "NECOutput", "QNetwork", "make_encoder"]


class _Bytes(nn.Module):
    """0..255 to 0..1."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 255


def _mlp(shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    return [nn.Flatten()], math.prod(shape)


def _minatar(shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    return [nn.Conv2d(shape[0], 16, 3), nn.ReLU(), nn.Flatten()], 16 * (shape[1] - 2) * (shape[2] - 2)


def _nature(shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = [_Bytes()]
    channels, sides = shape[0], shape[1:]
    for out, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
        layers += [nn.Conv2d(channels, out, kernel, stride), nn.ReLU()]
        channels, sides = out, tuple((side - kernel) // stride + 1 for side in sides)
    return [*layers, nn.Flatten()], channels * math.prod(sides)


ENCODERS = {"mlp": (_mlp, 1), "minatar": (_minatar, 3), "nature": (_nature, 36)}  # trunk, least side of a picture


def make_encoder(kind: str, observation_shape: Sequence[int], hidden: int, width: int) -> nn.Sequential:
    """The network from observations [B, *observation_shape] to [B, width]: a trunk, a hidden layer with ReLU, a linear layer.

    Args:
        kind: "mlp" (no trunk), "minatar" (16 filters of 3 x 3), "nature" (Mnih et al. 2015: 32 of 8 x 8 by 4, 64 of 4 x 4 by 2, 64 of
            3 x 3, on bytes).
        observation_shape: without the batch; (channels, height, width) for the two with convolutions.
        hidden: units of the hidden layer.
        width: of the output.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """
    one_of("make_encoder", "kind", kind, tuple(ENCODERS))
    shape = tuple(observation_shape)
    for name, size in (*(("observation_shape", s) for s in shape), ("hidden", hidden), ("width", width)):
        _checks.whole("make_encoder", name, size, 1)
    trunk, least = ENCODERS[kind]
    if kind != "mlp" and (len(shape) != 3 or min(shape[1:]) < least):
        raise ValueError(
            f"memcore.make_encoder: 'observation_shape' must be (channels, height, width) with sides of at least {least} for {kind!r}, got {shape}"
        )
    layers, features = trunk(shape)
    return nn.Sequential(*layers, nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, width))


def _observed(owner: str, observations: Tensor, shape: tuple[int, ...], weight: Tensor) -> Tensor:
    if not isinstance(observations, Tensor):
        raise TypeError(f"memcore.{owner}: 'observations' must be a tensor, got {type(observations).__name__}")
    if observations.shape[1:] != shape or observations.dim() != len(shape) + 1:
        raise ValueError(f"memcore.{owner}: 'observations' must have shape (B, {', '.join(map(str, shape))}), got {tuple(observations.shape)}")
    if observations.device != weight.device:
        raise RuntimeError(f"memcore.{owner}: 'observations' must be on the device of the parameters ({weight.device}), got {observations.device}")
    return observations.to(weight.dtype)


class NECOutput(NamedTuple):
    """Action values and how they were found."""

    values: Tensor  # [B, A]; 0 for an action that has no memory yet
    known: Tensor  # [A] bool: the action has memories
    key: Tensor  # [B, D]
    distances: Tensor  # [A, B, K], squared; infinite where there are fewer than K


class NEC(nn.Module):
    """Values of actions read from episodic memory: the K nearest keys of each action's dictionary, weighted by inverse distance.

    h = f(s),  Q(s, a) = sum_i w_i v_i,  w_i = k_i / sum_j k_j,  k_i = 1 / (|h - h_i|^2 + delta)   over the K nearest h_i of dictionary a

    The dictionary is `memory`, a store and no buffer: it is not in the `state_dict` and does not move with the module.

    Args:
        observation_shape: of one observation.
        actions: A.
        encoder: "mlp", "minatar" or "nature", see `make_encoder`.
        hidden: units of its hidden layer.
        key_width: D.
        capacity: N, entries of each action's dictionary; a full one gives up the entry least recently used.
        neighbours: K (paper: 50).
        delta: > 0 (paper: 1e-3).
        alpha: how far an entry met again moves to its new value.

    Raises:
        ValueError, TypeError: for arguments that do not fit.

    Example:
        >>> model = NEC((4,), actions=2)
        >>> model.remember(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3), hashes=torch.arange(3))
        >>> model(torch.randn(1, 4)).values
        tensor([[1., 0.]], grad_fn=...)
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        actions: int,
        *,
        encoder: str = "mlp",
        hidden: int = 64,
        key_width: int = 16,
        capacity: int = 5000,
        neighbours: int = 10,
        delta: float = 1e-3,
        alpha: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("actions", actions), ("capacity", capacity), ("neighbours", neighbours)):
            _checks.whole("NEC", name, value, 1)
        for name, value in (("delta", delta), ("alpha", alpha)):
            _checks.finite_number("NEC", name, value)
        if not delta > 0:
            raise ValueError(f"memcore.NEC: 'delta' must be > 0, got {delta}")
        if not 0 < alpha <= 1:
            raise ValueError(f"memcore.NEC: 'alpha' must be in (0, 1], got {alpha}")
        self.observation_shape, self.actions = tuple(observation_shape), actions
        self.encoder = make_encoder(encoder, self.observation_shape, hidden, key_width)
        self.memory = DND(actions, capacity, key_width, 1, neighbours=neighbours, delta=delta, alpha=alpha)

    def embed(self, observations: Tensor) -> Tensor:
        """h = f(s), [B, D], of observations [B, *observation_shape]."""
        return self.encoder(_observed("NEC", observations, self.observation_shape, self.encoder[-1].weight))

    def forward(self, observations: Tensor, *, touch: bool = True) -> NECOutput:
        """Values of all actions.

        Args:
            observations: [B, *observation_shape].
            touch: the entries found count as used.

        Returns:
            `NECOutput`; its values are differentiable in the encoder's parameters and the dictionary's keys and values.
        """
        key = self.embed(observations)
        found = self.memory.lookup(key, touch=touch)
        return NECOutput(found.output[..., 0].T, torch.tensor(self.memory.counts) > 0, key, found.distances)

    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q(s, a), [B], of observations [B, *observation_shape] and one action each, [B] int64; the entries found do not count as used."""
        return self.memory.lookup(self.embed(observations), dictionary=self._acted(observations, actions), touch=False).output[:, 0]

    @torch.no_grad()
    def remember(self, observations: Tensor, actions: Tensor, targets: Tensor, hashes: Tensor) -> None:
        """Write entries (f(s), target) into the dictionaries of their actions, as if one after the other.

        Args:
            observations: [B, *observation_shape].
            actions: [B] int64, 0 .. A - 1.
            targets: [B].
            hashes: [B] int64, of the observations: an entry whose hash is known moves its value by alpha and takes the new key.

        Raises:
            ValueError: no such action, or sizes that differ.
        """
        for name, t in (("targets", targets), ("hashes", hashes)):
            _checks.shape("NEC", name, t, "B", tuple(observations.shape[:1]), "observations", tuple(observations.shape))
        key = self.embed(observations)
        self.memory.write(key, targets.to(key.dtype)[:, None], hashes, dictionary=self._acted(observations, actions))

    def _acted(self, observations: Tensor, actions: Tensor) -> Tensor:
        _checks.shape("NEC", "actions", actions, "B", tuple(observations.shape[:1]), "observations", tuple(observations.shape))
        if actions.numel() and not (0 <= int(actions.min()) and int(actions.max()) < self.actions):
            raise ValueError(f"memcore.NEC: 'actions' must be in 0..{self.actions - 1}, got {int(actions.min())}..{int(actions.max())}")
        return actions


class QNetwork(nn.Module):
    """The same encoder with a linear layer on top: what NEC is compared with.

    Args:
        observation_shape, actions, encoder, hidden, key_width: as in `NEC`; the key passes a ReLU on its way to the values.
    """

    def __init__(
        self, observation_shape: Sequence[int], actions: int, *, encoder: str = "mlp", hidden: int = 64, key_width: int = 16
    ) -> None:
        super().__init__()
        _checks.whole("QNetwork", "actions", actions, 1)
        self.observation_shape, self.actions = tuple(observation_shape), actions
        self.encoder = make_encoder(encoder, self.observation_shape, hidden, key_width)
        self.output = nn.Linear(key_width, actions)

    def forward(self, observations: Tensor) -> Tensor:
        """Values [B, A] of observations [B, *observation_shape]."""
        return self.output(self.encoder(_observed("QNetwork", observations, self.observation_shape, self.output.weight)).relu())
