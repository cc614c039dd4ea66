"""How an agent acts and learns: Neural Episodic Control, and the DQN it is compared with."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.nec import NEC, QNetwork
from ..train.optimizers import make_optimizer
from .environments import Environment
from .replay import Replay, n_step_targets, observation_hash

__all__ = ["DQNAgent", "NECAgent", "make_agent"]


class Agent(Protocol):
    """What the training loop needs of an agent."""

    network: nn.Module
    optimizer: torch.optim.Optimizer

    def choose(self, observation: np.ndarray, *, explore: bool = True) -> int | None:
        """The greedy action, None if all are alike; with `explore` false nothing is remembered of the visit."""

    def observe(self, observation: np.ndarray, action: int, reward: float, after: np.ndarray, terminated: bool, truncated: bool) -> None:
        """One move of the episode that `choose` was asked about."""

    def learn(self, generator: torch.Generator) -> float | None:
        """One update; the loss before it, None while there is nothing to learn from."""


def _action(values: Tensor, known: Tensor | None = None) -> int | None:
    if known is None:
        return int(values.argmax())
    return int(values.masked_fill(~known, -torch.inf).argmax()) if known.any() else None


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float | None) -> float:
    """Backpropagate and move the network's parameters, unless the loss is NaN or infinite."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    value = loss.item()
    if np.isfinite(value):
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
    return value


class NECAgent:
    """Writes (f(s_t), Q^(n)(s_t, a_t)) into its dictionaries and learns from a replay of (s_t, a_t, Q^(n)), as in Pritzel et al. (2017).

    Q^(n)(s_t, a_t) = sum_{j<n} gamma^j r_{t+j} + gamma^n max_a Q(s_{t+n}, a), with Q(s_{t+n}, .) as it was when s_{t+n} was met.
    Complete targets are written at every call of `learn` and `flush`, the rest at the end of the episode.

    Args:
        env: for its shapes.
        model: options of `memcore.NEC`.
        n_step: n.
        gamma: discount.
        lr: of the encoder (Adam).
        memory_lr: of the dictionary's keys and values (row-sparse Adam).
        grad_keys: keys learn by backpropagation, not only values.
        replay: records kept.
        batch_size: records an update.
        clip_norm: bound of the norm of the encoder's gradient.
    """

    def __init__(
        self,
        env: Environment,
        model: Mapping[str, Any],
        *,
        n_step: int,
        gamma: float,
        lr: float,
        memory_lr: float,
        grad_keys: bool,
        replay: int,
        batch_size: int,
        clip_norm: float | None,
    ) -> None:
        self.network = NEC(env.observation_shape, env.actions, **model)
        self.optimizer = make_optimizer("adam", self.network.parameters(), lr)
        self.n_step, self.gamma, self.memory_lr, self.grad_keys = n_step, gamma, memory_lr, grad_keys
        self.batch_size, self.clip_norm = batch_size, clip_norm
        self.replay = Replay(
            replay,
            {"observation": (env.observation_shape, env.observation_dtype), "action": ((), np.int64), "target": ((), np.float32)},
        )
        self._distances = np.zeros(3)  # sums over lookups: how many, nearest, furthest neighbour
        self.begin()

    def begin(self) -> None:
        """Forget the running episode."""
        self._observations: list[np.ndarray] = []
        self._actions: list[int] = []
        self._rewards: list[float] = []
        self._values: list[float] = []
        self._written = 0

    @torch.no_grad()
    def choose(self, observation: np.ndarray, *, explore: bool = True) -> int | None:
        found = self.network(torch.from_numpy(observation)[None], touch=explore)
        values, known = found.values[0], found.known
        if explore:
            self._values.append(float(values[known].max()) if known.any() else 0.0)
            self._note(found.distances)
        return _action(values, known)

    def _note(self, distances: Tensor) -> None:
        d = distances[:, 0].numpy()
        finite = np.isfinite(d)
        for row in np.flatnonzero(finite[:, 0]):
            found = d[row][finite[row]]
            self._distances += 1, found[0], found[-1]

    def observe(self, observation: np.ndarray, action: int, reward: float, after: np.ndarray, terminated: bool, truncated: bool) -> None:
        self._observations.append(observation)
        self._actions.append(action)
        self._rewards.append(reward)
        if terminated or truncated:
            if terminated:
                self._values.append(0.0)
            else:
                self.choose(after)
            self._write(len(self._actions))
            self.begin()

    def _write(self, until: int) -> None:
        """Store steps `_written` .. `until` - 1 of the running episode, in dictionaries and replay."""
        first, last = self._written, min(until - 1 + self.n_step, len(self._actions))
        if until <= first:
            return
        rewards, values = self._rewards[first:last], self._values[first : last + 1]  # the value of a terminal state is noted as 0
        targets = n_step_targets(rewards, values, self.n_step, self.gamma, terminal=False)[: until - first]
        observations = np.stack(self._observations[first:until])
        actions = np.array(self._actions[first:until])
        hashes = torch.tensor([observation_hash(o) for o in observations])
        for record in zip(observations, actions, targets, strict=True):
            self.replay.add(**dict(zip(("observation", "action", "target"), record, strict=True)))
        self.network.remember(*(torch.from_numpy(x) for x in (observations, actions, targets)), hashes)
        self._written = until

    def flush(self) -> None:
        """Write the steps of the running episode whose targets are complete."""
        self._write(len(self._values) - self.n_step)

    def learn(self, generator: torch.Generator) -> float | None:
        self.flush()
        if not len(self.replay):
            return None
        batch = self.replay.sample(self.batch_size, generator)
        loss = F.mse_loss(self.network.value(batch["observation"], batch["action"]), batch["target"])
        value = _step(self.network, self.optimizer, loss, self.clip_norm)
        self.network.memory.step(self.memory_lr, keys=self.grad_keys)  # leaves rows as they are that would not be finite
        return value

    def row(self) -> dict[str, Any]:
        """Entries of each dictionary; mean squared distances of the nearest and the furthest neighbour since the last call."""
        n, nearest, furthest = self._distances.tolist()
        self._distances[:] = 0
        n = n or float("nan")
        return {"memory": list(self.network.memory.counts), "nearest": nearest / n, "furthest": furthest / n}

    def state(self) -> dict[str, Tensor]:
        """Dictionaries, replay, and what of the running episode the environment cannot repeat."""
        return {
            **{f"memory/{k}": v for k, v in self.network.memory.state_dict().items()},
            **{f"replay/{k}": v for k, v in self.replay.state().items()},
            "values": torch.tensor(self._values, dtype=torch.float64),
            "written": torch.tensor(self._written),
            "distances": torch.from_numpy(self._distances),
        }

    def load_state(self, state: Mapping[str, Tensor], episode: Iterable[tuple[np.ndarray, int, float]]) -> None:
        """Put back what `state` gave; `episode` repeats (observation, action, reward) of the running episode."""
        self.network.memory.load_state_dict(_below(state, "memory/"))
        self.replay.load_state(_below(state, "replay/"))
        for observation, action, reward in episode:
            self._observations.append(observation)
            self._actions.append(action)
            self._rewards.append(reward)
        self._values, self._written = state["values"].tolist(), int(state["written"])
        self._distances = state["distances"].numpy().copy()


class DQNAgent:
    """Deep Q-learning (Mnih et al. 2015) with a target network and, unless told otherwise, double targets (van Hasselt et al. 2016).

    Args:
        env: for its shapes.
        model: options of `QNetwork`.
        gamma, lr, replay, batch_size, clip_norm: as for `NECAgent`.
        target_every: updates between copies into the target network.
        double: the online network chooses the action whose value the target network gives.
        clip_reward: rewards count by their sign.
    """

    def __init__(
        self,
        env: Environment,
        model: Mapping[str, Any],
        *,
        gamma: float,
        lr: float,
        replay: int,
        batch_size: int,
        clip_norm: float | None,
        target_every: int,
        double: bool = True,
        clip_reward: bool = False,
    ) -> None:
        self.network = QNetwork(env.observation_shape, env.actions, **model)
        self.target = QNetwork(env.observation_shape, env.actions, **model)
        self.target.load_state_dict(self.network.state_dict())
        self.optimizer = make_optimizer("adam", self.network.parameters(), lr)
        self.gamma, self.batch_size, self.clip_norm = gamma, batch_size, clip_norm
        self.target_every, self.double, self.clip_reward, self._updates = target_every, double, clip_reward, 0
        seen = (env.observation_shape, env.observation_dtype)
        self.replay = Replay(
            replay, {"observation": seen, "action": ((), np.int64), "reward": ((), np.float32), "after": seen, "terminal": ((), np.bool_)}
        )

    @torch.no_grad()
    def choose(self, observation: np.ndarray, *, explore: bool = True) -> int | None:
        return _action(self.network(torch.from_numpy(observation)[None])[0])

    def observe(self, observation: np.ndarray, action: int, reward: float, after: np.ndarray, terminated: bool, truncated: bool) -> None:
        reward = float(np.sign(reward)) if self.clip_reward else reward
        self.replay.add(observation=observation, action=action, reward=reward, after=after, terminal=terminated)

    @torch.no_grad()
    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """r + gamma Q'(s', argmax_a Q(s', a)), without the second term where s' is terminal."""
        after = self.target(batch["after"])
        chosen = self.network(batch["after"]) if self.double else after
        best = after.gather(1, chosen.argmax(1, keepdim=True))[:, 0]
        return batch["reward"] + self.gamma * best * ~batch["terminal"]

    def learn(self, generator: torch.Generator) -> float:
        batch = self.replay.sample(self.batch_size, generator)
        targets = self.targets(batch)
        values = self.network(batch["observation"]).gather(1, batch["action"][:, None])[:, 0]
        value = _step(self.network, self.optimizer, F.smooth_l1_loss(values, targets), self.clip_norm)
        self._updates += 1
        if self._updates % self.target_every == 0:
            self.target.load_state_dict(self.network.state_dict())
        return value

    def row(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"target/{k}": v for k, v in self.target.state_dict().items()},
            **{f"replay/{k}": v for k, v in self.replay.state().items()},
            "updates": torch.tensor(self._updates),
        }

    def load_state(self, state: Mapping[str, Tensor], episode: Iterable[tuple[np.ndarray, int, float]]) -> None:
        self.target.load_state_dict(_below(state, "target/"))
        self.replay.load_state(_below(state, "replay/"))
        self._updates = int(state["updates"])
        for _ in episode:
            pass


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


AGENTS = {"nec": NECAgent, "dqn": DQNAgent}


def make_agent(kind: str, env: Environment, model: Mapping[str, Any], settings: Mapping[str, Any]) -> Agent:
    """The agent called `kind`, "nec" or "dqn".

    Raises:
        ValueError, TypeError: no such agent, or an option out of range.
    """
    if kind not in AGENTS:
        raise ValueError(f"memcore.rl: 'agent' must be one of {', '.join(AGENTS)}, got {kind!r}")
    return AGENTS[kind](env, model, **settings)
