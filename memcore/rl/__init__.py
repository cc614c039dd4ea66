"""Agents with episodic memory: environments by name, replay, n-step targets, NEC and DQN, their training loop."""

from .agents import DQNAgent, NECAgent, make_agent
from .environments import make_env
from .loop import AgentResult, play, train_agent
from .replay import Replay, epsilon_at, n_step_targets, observation_hash

__all__ = [
    "AgentResult",
    "DQNAgent",
    "NECAgent",
    "Replay",
    "epsilon_at",
    "make_agent",
    "make_env",
    "n_step_targets",
    "observation_hash",
    "play",
    "train_agent",
]
