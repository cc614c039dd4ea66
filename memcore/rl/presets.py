"""Settings of `memcore train nec` by environment: everything a run uses that is not on its command line."""

from copy import deepcopy
from typing import Any

__all__ = ["AGENT_PRESETS", "agent_preset"]

_TRAIN = {"period": 4, "learning_starts": 500, "log_every": 500, "epsilon_start": 1.0, "epsilon_end": 0.01, "epsilon_steps": 1000}
_NEC = {"n_step": 100, "gamma": 0.99, "lr": 3e-4, "memory_lr": 1e-2, "grad_keys": True, "replay": 100_000, "batch_size": 32, "clip_norm": 10.0}
_DQN = {"gamma": 0.99, "lr": 1e-3, "replay": 100_000, "batch_size": 32, "clip_norm": 10.0, "target_every": 500, "double": True}
_MLP = {"encoder": "mlp", "hidden": 64, "key_width": 16}
_WIDE = {**_MLP, "key_width": 64}  # the DQN does better with a wider last layer, and with an update every step

# An entry holds `train` (arguments of `train_agent`), and for each agent its learning settings and its network.
AGENT_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "CartPole-v1": {
        "train": {**_TRAIN, "steps": 40_000},
        "nec": _NEC,
        "nec_model": {**_MLP, "capacity": 20_000, "neighbours": 50},
        "dqn": {**_DQN, "period": 1, "batch_size": 64},
        "dqn_model": _WIDE,
    },
    "Catch": {
        "train": {**_TRAIN, "steps": 3_000, "learning_starts": 100, "eval_episodes": 20, "log_every": 100, "epsilon_end": 0.05, "epsilon_steps": 400},
        "nec": {**_NEC, "period": 1, "lr": 1e-3, "memory_lr": 1e-3},
        "nec_model": {**_MLP, "capacity": 5_000, "neighbours": 3, "alpha": 0.5},
        "dqn": {**_DQN, "period": 1, "lr": 3e-3, "target_every": 25},
        "dqn_model": _MLP,
    },
    "MinAtar": {
        "train": {**_TRAIN, "steps": 300_000, "learning_starts": 1000, "epsilon_steps": 20_000, "log_every": 5000},
        "nec": _NEC,
        "nec_model": {"encoder": "minatar", "hidden": 128, "key_width": 32, "capacity": 20_000, "neighbours": 50},
        "dqn": {**_DQN, "lr": 2.5e-4, "target_every": 250},
        "dqn_model": {"encoder": "minatar", "hidden": 128, "key_width": 32},
    },
    "ALE": {
        "train": {**_TRAIN, "steps": 1_000_000, "learning_starts": 10_000, "epsilon_steps": 50_000, "log_every": 10_000},
        "nec": {**_NEC, "replay": 30_000, "lr": 1e-4, "memory_lr": 1e-3},
        "nec_model": {"encoder": "nature", "hidden": 512, "key_width": 64, "capacity": 50_000, "neighbours": 50},
        "dqn": {**_DQN, "replay": 30_000, "lr": 1e-4, "target_every": 2500, "clip_reward": True},
        "dqn_model": {"encoder": "nature", "hidden": 512, "key_width": 64},
    },
}
# CartPole's serve any environment that has none of its own and observes a vector.
_FAMILIES = ("MinAtar", "ALE")


def agent_preset(env: str, agent: str) -> dict[str, dict[str, Any]]:
    """The settings {"train", "model"} of one agent in an environment; those of CartPole-v1 where the environment has none of its own.

    Raises:
        ValueError: no such agent.
    """
    if agent not in ("nec", "dqn"):
        raise ValueError(f"memcore.rl: 'agent' must be one of nec, dqn, got {agent!r}")
    family = env.partition("/")[0]
    entry = deepcopy(AGENT_PRESETS[env if env in AGENT_PRESETS else family if family in _FAMILIES else "CartPole-v1"])
    return {"train": {**entry["train"], **entry[agent]}, "model": entry[f"{agent}_model"]}
