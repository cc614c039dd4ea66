"""What agents learn from: n-step targets, a uniform replay memory, the hash of an observation, the exploration rate."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .._checks import whole

__all__ = ["Replay", "epsilon_at", "n_step_targets", "observation_hash"]


def observation_hash(observation: np.ndarray) -> int:
    """64 bits, as a signed integer, of what the observation holds, whatever its layout in memory.

    Equal numbers of one dtype and shape have equal hashes: -0.0 counts as 0.0.
    """
    array = np.ascontiguousarray(observation)
    if array.dtype.kind == "f":
        array = array + 0.0
    digest = hashlib.blake2b(array.data, digest_size=8, key=f"{array.dtype.str}{array.shape}".encode()[:64])
    return int.from_bytes(digest.digest(), "little", signed=True)


def n_step_targets(rewards: Sequence[float], values: Sequence[float], n: int, gamma: float, terminal: bool) -> np.ndarray:
    """Targets of every step of (a stretch of) an episode, in float64.

    target[t] = sum_{j<m} gamma^j r[t+j] + gamma^m V[t+m],  m = min(n, T - t)

    Args:
        rewards: T of them.
        values: max_a Q(s_t, a) of s_0 .. s_T, T + 1 of them.
        n: steps of the sum.
        gamma: discount.
        terminal: s_T is terminal: V[T] counts as 0. A time limit is not terminal.

    Raises:
        ValueError: the lengths do not fit, or n < 1.
    """
    whole("rl.n_step_targets", "n", n, 1)
    if len(values) != len(rewards) + 1:
        raise ValueError(f"memcore.rl.n_step_targets: 'values' must have one entry more than 'rewards' ({len(rewards)}), got {len(values)}")
    r, v = np.asarray(rewards, np.float64), np.array(values, np.float64)
    steps = len(r)
    if terminal:
        v[-1] = 0.0
    sums = np.zeros(steps + 1)  # of gamma^j r[t+j] to the end
    for t in range(steps - 1, -1, -1):
        sums[t] = r[t] + gamma * sums[t + 1]
    m = np.minimum(n, steps - np.arange(steps))
    at = np.arange(steps) + m
    return sums[:-1] - gamma**m * sums[at] + gamma**m * v[at]


def epsilon_at(step: int, start: float, end: float, steps: int) -> float:
    """The exploration rate: from `start` at step 0 in a line to `end` at step `steps`, and there it stays."""
    return end if step >= steps else start + (end - start) * step / steps


class Replay:
    """A ring of the newest `capacity` records, drawn uniformly with replacement.

    Args:
        capacity: records.
        fields: name -> (shape, dtype) of one record.

    Raises:
        ValueError, TypeError: the capacity is not a positive integer.
    """

    def __init__(self, capacity: int, fields: Mapping[str, tuple[tuple[int, ...], np.dtype | type]]) -> None:
        whole("rl.Replay", "capacity", capacity, 1)
        self.capacity, self.written = capacity, 0
        self._data = {name: np.empty((capacity, *shape), dtype) for name, (shape, dtype) in fields.items()}

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    def add(self, **record: object) -> None:
        """Store one record; when the ring is full it takes the oldest one's place."""
        at = self.written % self.capacity
        for name, data in self._data.items():
            data[at] = record[name]
        self.written += 1

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`batch_size` records, drawn with `generator`.

        Raises:
            ValueError: nothing is stored yet.
        """
        if not self.written:
            raise ValueError("memcore.rl.Replay: 'sample' must come after the first 'add'")
        at = torch.randint(len(self), (batch_size,), generator=generator).numpy()
        return {name: torch.from_numpy(data[at]) for name, data in self._data.items()}

    def state(self) -> dict[str, Tensor]:
        """What is stored, for a checkpoint."""
        filled = {name: torch.from_numpy(data[: len(self)]) for name, data in self._data.items()}
        return {**filled, "written": torch.tensor(self.written)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.written = int(state["written"])
        for name, data in self._data.items():
            data[: len(self)] = state[name].numpy()
