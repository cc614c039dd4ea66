"""Environments by name behind one small interface: our own Catch, and gymnasium, MinAtar and ALE where they are installed.

Nothing here imports another package before an environment of it is made. MinAtar and ale-py are under the GPL: they are extras of
their own, which nothing else pulls in.
"""

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .._extras import require
from ..tasks.catch import Catch

__all__ = ["Atari", "Environment", "Gymnasium", "MinAtar", "make_env"]


class Environment(Protocol):
    """What an agent plays. An episode depends on the seed of `reset` and the actions alone."""

    observation_shape: tuple[int, ...]
    observation_dtype: np.dtype
    actions: int

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode; its first observation."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """(observation, reward, terminated, truncated): a terminal state has no future, a time limit only hides it."""


class Gymnasium:
    """A gymnasium environment with an array to observe and a finite number of actions.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: no such environment, or one with other spaces.
    """

    def __init__(self, name: str) -> None:
        gymnasium = require("gymnasium", extra="rl")
        try:
            self.env = gymnasium.make(name)
        except (gymnasium.error.Error, ModuleNotFoundError) as e:
            raise ValueError(f"memcore.rl.make_env: 'name' must be an environment that gymnasium can make, got {name!r} ({e})") from e
        observed, acted = self.env.observation_space, self.env.action_space
        if isinstance(observed, gymnasium.spaces.Discrete):
            self.observation_shape, self.observation_dtype = (int(observed.n),), np.dtype(np.uint8)
            self._one_hot = np.eye(int(observed.n), dtype=np.uint8)
        elif isinstance(observed, gymnasium.spaces.Box):
            integral = observed.dtype == np.uint8
            self.observation_shape, self.observation_dtype = observed.shape, np.dtype(np.uint8 if integral else np.float32)
            self._one_hot = None
        else:
            raise ValueError(f"memcore.rl.make_env: {name!r} must observe a Box or Discrete space, got {observed}")
        if not isinstance(acted, gymnasium.spaces.Discrete):
            raise ValueError(f"memcore.rl.make_env: {name!r} must have a Discrete space of actions, got {acted}")
        self.actions, self._first_action = int(acted.n), int(acted.start)

    def _seen(self, observation: Any) -> np.ndarray:
        return np.array(observation, self.observation_dtype) if self._one_hot is None else self._one_hot[int(observation)].copy()

    def reset(self, seed: int) -> np.ndarray:
        return self._seen(self.env.reset(seed=seed)[0])

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        observation, reward, terminated, truncated, _ = self.env.step(action + self._first_action)
        return self._seen(observation), float(reward), bool(terminated), bool(truncated)


class MinAtar:
    """A MinAtar game, sticky actions 0.1; -v0 has all six actions, -v1 the game's minimal set, as in its registered names.

    Raises:
        ImportError: MinAtar is not installed.
        ValueError: no such game.
    """

    GAMES = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
    MODULES = {"SpaceInvaders": "space_invaders"}
    observation_dtype = np.dtype(np.uint8)

    def __init__(self, name: str) -> None:
        game, _, version = name.removeprefix("MinAtar/").rpartition("-")
        if game not in self.GAMES or version not in ("v0", "v1"):
            raise ValueError(f"memcore.rl.make_env: 'name' must be MinAtar/ and one of {', '.join(self.GAMES)} with -v0 or -v1, got {name!r}")
        self._make = require("minatar", extra="minatar").Environment
        self._game = self.MODULES.get(game, game.lower())
        env = self._make(self._game)
        self._set = list(range(env.num_actions())) if version == "v0" else [int(a) for a in env.minimal_action_set()]
        height, width, channels = env.state_shape()
        self.observation_shape, self.actions = (channels, height, width), len(self._set)

    def _seen(self) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(self.env.state(), -1, 0), np.uint8)

    def reset(self, seed: int) -> np.ndarray:
        self.env = self._make(self._game)  # afresh: its own reset keeps the last action and its ramping
        self.env.seed(seed)
        self.env.reset()
        return self._seen()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        reward, over = self.env.act(self._set[action])
        return self._seen(), float(reward), bool(over), False


class Atari:
    """An Atari game by the bare ALE: 84 x 84 grey, the last four of them, each action for four frames, greatest of the last two.

    Minimal action set, no sticky actions, up to 30 idle frames to begin with, 30 minutes of play (108,000 frames) at most.

    Raises:
        ImportError: ale-py is not installed.
        ValueError: no such game.
    """

    observation_shape, observation_dtype = (4, 84, 84), np.dtype(np.uint8)
    SKIP, FRAMES, IDLE = 4, 108_000, 30

    def __init__(self, name: str) -> None:
        ale_py = require("ale_py", extra="atari")
        roms = require("ale_py.roms", extra="atari")
        game = name.removeprefix("ALE/").removesuffix("-v5")
        self._rom = next((rom for rom in roms.get_all_rom_ids() if rom.replace("_", "") == game.lower()), None)
        if self._rom is None:
            raise ValueError(f"memcore.rl.make_env: 'name' must be ALE/GAME-v5 with a game that ale-py has, got {name!r}")
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale, self._path = ale_py.ALEInterface(), roms.get_rom_path(self._rom)
        self._load(0)
        self._set = self._ale.getMinimalActionSet()
        self.actions = len(self._set)

    def _load(self, seed: int) -> None:
        self._ale.setInt("random_seed", seed % 2**31)
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.loadROM(self._path)  # the seed takes effect here

    def _grey(self, *screens: np.ndarray) -> np.ndarray:
        screen = torch.from_numpy(np.maximum.reduce(screens)).float()[None, None]
        return F.interpolate(screen, (84, 84), mode="bilinear", antialias=True)[0, 0].round().to(torch.uint8).numpy()

    def reset(self, seed: int) -> np.ndarray:
        self._load(seed)
        self._frames = int(np.random.default_rng(seed).integers(1, self.IDLE + 1))
        for _ in range(self._frames):
            self._ale.act(0)
        self._stack = np.repeat(self._grey(self._ale.getScreenGrayscale())[None], 4, 0)
        return self._stack.copy()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        reward, screens = 0.0, []
        for _ in range(self.SKIP):
            reward += self._ale.act(self._set[action])
            screens = [*screens[-1:], self._ale.getScreenGrayscale()]
            self._frames += 1
            if self._ale.game_over():
                break
        self._stack = np.concatenate([self._stack[1:], self._grey(*screens)[None]])
        over = bool(self._ale.game_over())
        return self._stack.copy(), reward, over, not over and self._frames >= self.FRAMES


def make_env(name: str) -> Environment:
    """The environment called `name`.

    Args:
        name: "Catch", "MinAtar/Breakout-v1" (extra minatar), "ALE/Pong-v5" (extra atari), or any name that `gymnasium.make` knows,
            "CartPole-v1" (extra rl).

    Raises:
        ValueError: no such environment, or one that these agents cannot play.
        ImportError: the package it comes from is not installed; names the extra.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"memcore.rl.make_env: 'name' must be an environment's name, got {name!r}")
    if name == "Catch":
        return Catch()
    if name.startswith("MinAtar/"):
        return MinAtar(name)
    if name.startswith("ALE/"):
        return Atari(name)
    return Gymnasium(name)
