"""The training loop of agents: seeded, resumable to the bit in the middle of an episode, interruptible."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ..train.loop import CHECKPOINT, CURVE, SAVE_SECONDS, Diverged, Interrupted, _Curve, _same_run, _signals
from ..train.progress import Progress
from .agents import Agent
from .environments import Environment
from .replay import epsilon_at, observation_hash

__all__ = ["AgentResult", "play", "train_agent"]

EVAL_SEED = 20170306


@dataclass
class AgentResult:
    """What a training run did; `returns` and `ends` hold each finished episode's return and last step."""

    steps: int
    episodes: int
    seconds: float
    stopped: str
    returns: list[float] = field(repr=False)
    ends: list[int] = field(repr=False)
    curve: list[dict[str, Any]] = field(repr=False)
    checkpoint: Path | None = None


class _Bar(Progress):
    unit = "step"

    def text(self, row: dict[str, Any], rate: float) -> str:
        shown = "no episode ended" if row["return"] is None else f"return {row['return']:.2f}"
        return f"{shown}, {row['episodes']:,} episodes, {rate:,.0f} steps/s"


def episode_seed(seed: int, episode: int) -> int:
    """What the environment is reset with: every episode has a seed of its own."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def play(env: Environment, agent: Agent, *, episodes: int, seed: int = EVAL_SEED) -> list[float]:
    """Returns of whole episodes played greedily, without learning; the same episodes for every agent.

    Args:
        env: an environment that nobody else is playing in.
        agent: chooses the actions; the first one where it knows nothing.
        episodes: how many.
        seed: of the episodes.
    """
    returns = []
    for episode in range(episodes):
        observation, total, over = env.reset(episode_seed(seed, episode)), 0.0, False
        while not over:
            observation, reward, terminated, truncated = env.step(agent.choose(observation, explore=False) or 0)
            total += reward
            over = terminated or truncated
        returns.append(total)
    return returns


def check_agent_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of `train_agent` or of an agent, of those given, that is out of range."""
    wholes = {"steps": 1, "period": 1, "log_every": 1, "batch_size": 1, "replay": 1, "n_step": 1, "target_every": 1}
    for name, least in {**wholes, "learning_starts": 0, "epsilon_steps": 0, "eval_episodes": 0, "seed": 0}.items():
        value = settings.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"memcore.rl: '{name}' must be an integer >= {least}, got {value!r}")
    for name in ("epsilon_start", "epsilon_end", "gamma"):
        value = settings.get(name, 0.0)
        if not 0 <= value <= 1:
            raise ValueError(f"memcore.rl: '{name}' must be in [0, 1], got {value!r}")
    for name in ("lr", "memory_lr"):
        value = settings.get(name, 1.0)
        if not 0 < value < math.inf:
            raise ValueError(f"memcore.rl: '{name}' must be > 0 and finite, got {value!r}")
    for name in ("clip_norm", "max_minutes"):
        value = settings.get(name)
        if value is not None and not value > 0:
            raise ValueError(f"memcore.rl: '{name}' must be > 0 or None, got {value!r}")


def _repeat(env: Environment, seed: int, actions: list[int], seen: int, path: Path) -> Iterator[tuple[np.ndarray, int, float]]:
    """Play the running episode again up to where the checkpoint was saved."""
    observation = env.reset(seed)
    for action in actions:
        after, reward, _, _ = env.step(action)
        yield observation, action, reward
        observation = after
    if observation_hash(observation) != seen:
        raise CheckpointError(
            f"memcore.rl: {str(path)!r} cannot be resumed: the environment does not repeat its episode from its seed and actions "
            f"(another version of it?)"
        )
    yield observation, -1, 0.0


def train_agent(
    agent: Agent,
    env: Environment,
    *,
    steps: int,
    period: int = 4,
    learning_starts: int = 500,
    epsilon_start: float = 1.0,
    epsilon_end: float = 0.01,
    epsilon_steps: int = 1000,
    log_every: int = 500,
    eval_episodes: int = 0,
    eval_env: Environment | None = None,
    seed: int = 0,
    max_minutes: float | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    meta: Mapping[str, Any] | None = None,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> AgentResult:
    """Let `agent` play in `env` and learn.

    Every `log_every` steps one row joins the learning curve: step, episodes, return (mean of the episodes ended since the last row,
    null if none), their returns and last steps, loss (mean of the updates), epsilon, what the agent tells of itself (NEC: entries of
    each dictionary, mean squared distance of the nearest and the furthest neighbour), eval_return, seconds.

    Args:
        agent: see `make_agent`. Seed it (`torch.manual_seed`) before making it.
        env: see `make_env`. Episode i is reset with a seed made of `seed` and i.
        steps: of the environment in all, those before a resume included.
        period: steps between updates.
        learning_starts: steps before the first update.
        epsilon_start, epsilon_end, epsilon_steps: rate of random actions, in a line from the first to the second.
        eval_episodes: greedy episodes at each row, in `eval_env`.
        seed: of episodes, exploration and replay.
        max_minutes: stop after so many minutes, those before a resume included.
        out: folder for `checkpoint.safetensors` and `curve.jsonl`; without it nothing is written.
        resume: continue from the checkpoint in `out`, bit for bit as if never stopped (same threads, same machine).
        meta: kept in the checkpoint.
        progress: draw a bar on stderr.
        callback: called with each row.

    Raises:
        ValueError: a setting is out of range, or differs from the run that is resumed.
        Diverged: the loss is NaN or infinite; the last checkpoint is kept.
        Interrupted: SIGINT or SIGTERM (main thread only); a checkpoint was saved.
    """
    settings = {
        "period": period,
        "learning_starts": learning_starts,
        "epsilon_start": epsilon_start,
        "epsilon_end": epsilon_end,
        "epsilon_steps": epsilon_steps,
        "log_every": log_every,
        "eval_episodes": eval_episodes,
        "seed": seed,
    }
    check_agent_settings({**settings, "steps": steps, "max_minutes": max_minutes})
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise ValueError("memcore.rl: 'out' must name the run's folder to resume it, got None")
    if eval_episodes and eval_env is None:
        raise ValueError("memcore.rl: 'eval_env' must be an environment of its own where 'eval_episodes' > 0, got None")
    generator = torch.Generator().manual_seed(seed)
    path = None if folder is None else folder / CHECKPOINT
    step, episode, seconds, losses = 0, 0, 0.0, [0.0, 0]  # losses: sum and number since the last row
    total, actions, observation = 0.0, [], None  # of the running episode
    recent: list[tuple[float, int]] = []  # (return, last step) of the episodes ended since the last row
    if resume:
        loaded = load_checkpoint(path)
        saved = loaded.meta["train"]
        _same_run(saved["settings"], settings, path)
        loaded.restore(agent.network, agent.optimizer, generator)
        step, episode, seconds, losses = saved["step"], saved["episode"], saved["seconds"], saved["losses"]
        recent = [tuple(r) for r in saved["recent"]]
        if step > steps:
            raise ValueError(f"memcore.rl: 'steps' must be at least the {step} done before, got {steps}")
        extra = dict(loaded.extra)
        actions, seen = extra.pop("actions").tolist(), int(extra.pop("seen"))
        played = []
        if saved["playing"]:
            *played, (observation, _, _) = _repeat(env, episode_seed(seed, episode), actions, seen, path)
            total = sum(reward for _, _, reward in played)
        agent.load_state(extra, played)
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    curve = _Curve(None if folder is None else folder / CURVE, step)
    began = time.perf_counter() - seconds
    stopped = "steps"

    def save() -> None:
        if path is None:
            return
        state = {
            "step": step, "episode": episode, "seconds": time.perf_counter() - began, "losses": losses, "recent": recent,
            "playing": observation is not None, "settings": settings,
        }  # fmt: skip
        seen = 0 if observation is None else observation_hash(observation)
        extra = {**agent.state(), "actions": torch.tensor(actions, dtype=torch.int64), "seen": torch.tensor(seen)}
        save_checkpoint(path, agent.network, agent.optimizer, generator, {"train": state, "user": dict(meta or {})}, extra=extra)

    saved_at = time.perf_counter()
    with _signals() as caught, _Bar(steps, step, 1, progress) as bar:
        while step < steps:
            if observation is None:
                observation, total, actions = env.reset(episode_seed(seed, episode)), 0.0, []
            epsilon = epsilon_at(step, epsilon_start, epsilon_end, epsilon_steps)
            action = agent.choose(observation)
            if action is None or torch.rand((), generator=generator).item() < epsilon:
                action = int(torch.randint(env.actions, (), generator=generator))
            after, reward, terminated, truncated = env.step(action)
            agent.observe(observation, action, reward, after, terminated, truncated)
            actions.append(action)
            total += reward
            observation = after
            step += 1
            bar.advance()
            if terminated or truncated:
                recent.append((total, step))
                episode += 1
                observation, actions = None, []
            if step % period == 0 and step >= learning_starts:
                loss = agent.learn(generator)
                if loss is not None and not math.isfinite(loss):
                    kept = f"the last checkpoint is kept at {path}" if path is not None and path.exists() else "no checkpoint was written yet"
                    raise Diverged(f"memcore.rl: the loss became {loss} at step {step}; {kept}; a lower learning rate may help")
                if loss is not None:
                    losses = [losses[0] + loss, losses[1] + 1]
            late = max_minutes is not None and time.perf_counter() - began >= 60 * max_minutes
            if step % log_every == 0 or step == steps or late:
                row = {
                    "step": step,
                    "episodes": episode,
                    "return": float(np.mean([r for r, _ in recent])) if recent else None,
                    "returns": [r for r, _ in recent],
                    "ends": [end for _, end in recent],
                    "loss": losses[0] / losses[1] if losses[1] else None,
                    "epsilon": epsilon,
                    **agent.row(),
                }
                if eval_episodes:
                    row["eval_return"] = float(np.mean(play(eval_env, agent, episodes=eval_episodes)))
                row["seconds"] = round(time.perf_counter() - began, 3)
                losses, recent = [0.0, 0], []
                curve.append(row)
                bar.row(curve.rows[-1])
                if callback is not None:
                    callback(row)
                if time.perf_counter() - saved_at > SAVE_SECONDS:
                    save()
                    saved_at = time.perf_counter()
            if late:
                stopped = "max_minutes"
                break
            if caught:
                stopped = "interrupted"
                break
        save()
        seconds = time.perf_counter() - began
    if stopped == "interrupted":
        where = "nothing was saved (no output folder)" if path is None else f"saved to {path}"
        raise Interrupted(f"interrupted at step {step} of {steps}; {where}", caught[0])
    ended = [(r, e) for row in curve.rows for r, e in zip(row["returns"], row["ends"], strict=True)] + recent
    return AgentResult(step, episode, seconds, stopped, [r for r, _ in ended], [e for _, e in ended], curve.rows, path)
