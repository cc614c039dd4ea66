"""One run of an agent as a folder: checkpoint, learning curve, result."""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _backend
from ..train.checkpoint import CheckpointError, atomic_write, load_checkpoint
from ..train.experiment import RESULT, _folder, versions
from ..train.loop import CHECKPOINT, plain
from .agents import AGENTS, Agent, make_agent
from .environments import Environment, make_env
from .loop import EVAL_SEED, AgentResult, check_agent_settings, play, train_agent
from .presets import agent_preset

__all__ = ["build_agent", "configure_agent", "load_agent", "run_agent"]

WINDOW = (50, 100)  # episodes 51 to 100, which the bars are about


def configure_agent(
    agent: str, env: str, *, model_options: Mapping[str, Any] | None = None, **train_options: Any
) -> dict[str, Any]:
    """The whole configuration of a run: the environment's preset with overrides; plain data, saved with the run.

    Raises:
        ValueError: no such agent, or an option that this agent does not have.
    """
    base = agent_preset(env, agent)
    for name in train_options:
        if name not in (*_names(train_agent), *_names(AGENTS[agent])):
            raise ValueError(f"memcore.rl: '{name}' is no setting of agent {agent!r}")
    return {
        "task": env,
        "task_options": {},
        "model": agent,
        "model_options": {**base["model"], **(model_options or {})},
        "train": {"seed": 0, **base["train"], **train_options},
        "preset": "default",
    }


def _names(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("env", "model", "agent")]


def build_agent(config: Mapping[str, Any]) -> tuple[Agent, Environment]:
    """The agent, seeded by the configuration, and its environment.

    Raises:
        ValueError, TypeError, ImportError: an option is unknown or out of range, or the environment's package is missing.
    """
    check_agent_settings(config["train"])
    env = make_env(config["task"])
    torch.manual_seed(config["train"]["seed"])
    known = _names(AGENTS[config["model"]])
    return make_agent(config["model"], env, config["model_options"], {k: v for k, v in config["train"].items() if k in known}), env


def _summary(done: AgentResult) -> dict[str, Any]:
    first, last = WINDOW
    middle = None
    if len(done.returns) >= last:
        middle = {"mean": float(np.mean(done.returns[first:last])), "after_step": done.ends[first - 1], "to_step": done.ends[last - 1]}
    return {
        "return_51_100": middle,
        "return_last_100": float(np.mean(done.returns[-100:])) if done.returns else None,
        "return_best_100": max((float(np.mean(done.returns[i : i + 100])) for i in range(len(done.returns) - 99)), default=None),
    }


def run_agent(
    config: Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    test_episodes: int = 20,
    progress: bool = False,
    callback: Any = None,
    log: Any = None,
) -> tuple[dict[str, Any], Agent]:
    """Train one configuration and let it play; returns (result, agent), and writes the result into `out`.

    Args:
        test_episodes: greedy episodes at the end, the same ones for every run.
        log: called with one line of text as the run goes on.
    """
    check_agent_settings({**config["train"], "max_minutes": max_minutes})
    if test_episodes < 1:
        raise ValueError(f"memcore.rl: 'test_episodes' must be >= 1, got {test_episodes}")
    agent, env = build_agent(config)
    second = make_env(config["task"])
    folder = None if out is None else _folder(Path(out), resume)
    parameters = sum(p.numel() for p in agent.network.parameters())
    say = log or (lambda text: None)
    train = config["train"]
    say(
        f"{config['model']} on {config['task']}: {parameters:,} parameters, {env.actions} actions, {train['steps']:,} steps, seed {train['seed']}, "
        f"{torch.get_num_threads()} thread(s)" + ("" if folder is None else f", in {folder}")
    )
    known = _names(train_agent)
    done = train_agent(
        agent, env, eval_env=second, out=folder, resume=resume, max_minutes=max_minutes, meta=config, progress=progress, callback=callback,
        **{k: v for k, v in train.items() if k in known},
    )  # fmt: skip
    returns = play(second, agent, episodes=test_episodes)
    result = plain(
        {
            "task": config["task"],
            "model": config["model"],
            "preset": config["preset"],
            "seed": train["seed"],
            "steps": done.steps,
            "episodes": done.episodes,
            "seconds": round(done.seconds, 2),
            "threads": torch.get_num_threads(),
            "backend": _backend.describe(),
            "parameters": parameters,
            "stopped": done.stopped,
            **_summary(done),
            "test": {"episodes": test_episodes, "seed": EVAL_SEED, "mean": float(np.mean(returns)), "min": min(returns), "max": max(returns)},
            "config": config,
            "versions": versions(),
        }
    )
    if folder is not None:
        atomic_write(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result, agent


def load_agent(path: str | os.PathLike[str]) -> tuple[Agent, Environment, dict[str, Any]]:
    """The trained agent with its dictionaries, a fresh environment and the configuration, from a run's folder or checkpoint file.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it was not written by `memcore train nec`.
    """
    path = Path(path)
    loaded = load_checkpoint(path / CHECKPOINT if path.is_dir() or not path.exists() else path)
    config = loaded.meta.get("user") or {}
    if config.get("model") not in AGENTS:
        raise CheckpointError(f"memcore.load_agent: {str(loaded.path)!r} must be written by `memcore train nec`, got another kind of run")
    agent, env = build_agent(config)
    loaded.restore(agent.network)
    agent.load_state(loaded.extra, [])
    return agent, env, config
