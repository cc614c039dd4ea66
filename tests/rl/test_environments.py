"""Catch by its rules; the adapters: shapes, seeds, time limits, and the errors where a package or a game is missing."""

import builtins

import numpy as np
import pytest

from memcore.rl import make_env
from memcore.tasks import Catch


def play(env, seed, choose):
    board, total, moves = env.reset(seed), 0.0, 0
    while True:
        board, reward, terminated, truncated = env.step(choose(board))
        total, moves = total + reward, moves + 1
        if terminated or truncated:
            return total, moves, board


def follow(board):
    """Left, stay or right towards the ball's column."""
    ball = int(board[:9].max(0).argmax())
    return 1 + int(np.sign(ball - int(board[9].argmax())))


def test_catch_by_its_rules():
    env = Catch()
    board = env.reset(3)
    assert board.shape == env.observation_shape == (10, 5) and board.dtype == np.uint8 and env.actions == 3
    assert board[0].sum() == 1 and board[9].tolist() == [0, 0, 1, 0, 0] and board.sum() == 2
    ball = int(board[0].argmax())
    for move in range(1, 9):
        board, reward, terminated, truncated = env.step(0)
        assert board[move, ball] == 1 and board[9, max(2 - move, 0)] == 1 and board.sum() == 2
        assert (reward, terminated, truncated) == (0.0, False, False)
    board, reward, terminated, truncated = env.step(0)
    assert terminated and not truncated and reward == (1.0 if ball == 0 else -1.0)
    starts = {int(env.reset(seed)[0].argmax()) for seed in range(50)}
    assert starts == set(range(5))
    env.reset(0)
    assert [env.step(2)[0][9].argmax() for _ in range(4)] == [3, 4, 4, 4]


def test_catch_is_worth_one_to_the_best_and_minus_six_tenths_to_chance():
    env = Catch()
    assert {play(env, seed, follow)[:2] for seed in range(20)} == {(1.0, 9)}
    rng = np.random.default_rng(0)
    returns = [play(env, seed, lambda _: int(rng.integers(3)))[0] for seed in range(4000)]
    assert np.mean(returns) == pytest.approx(-0.6, abs=0.05)  # four standard errors


def same_episode(name, seeds=(5, 6), moves=40):
    """Two environments of one seed, one of them used before, show the same; another seed shows something else."""
    seen = []
    for i, seed in enumerate((*seeds[:1] * 2, seeds[1])):
        env = make_env(name)
        for warm in range(i % 2):
            env.reset(warm)
            env.step(0)
        rng = np.random.default_rng(0)
        out = [env.reset(seed)]
        for _ in range(moves):
            observation, reward, terminated, truncated = env.step(int(rng.integers(env.actions)))
            out += [observation, np.array(reward)]
            if terminated or truncated:
                break
        assert all(o.shape == env.observation_shape and o.dtype == env.observation_dtype for o in (out[0], out[1]))
        seen.append(b"".join(o.tobytes() for o in out))
    assert seen[0] == seen[1] != seen[2]


def test_cartpole_ends_by_falling_or_by_time():
    pytest.importorskip("gymnasium")
    same_episode("CartPole-v1")
    env = make_env("CartPole-v0")
    assert env.observation_shape == (4,) and env.observation_dtype == np.float32 and env.actions == 2
    upright = lambda o: int(o[2] + 0.3 * o[3] + 0.02 * o[0] + 0.05 * o[1] > 0)  # noqa: E731
    observation, moves = env.reset(0), 0
    while True:
        observation, reward, terminated, truncated = env.step(upright(observation))
        moves += 1
        if terminated or truncated:
            break
    assert (moves, reward, terminated, truncated) == (200, 1.0, False, True)
    total, moves, _ = play(env, 0, lambda _: 1)
    assert total == moves < 20


def test_a_discrete_observation_is_one_hot():
    pytest.importorskip("gymnasium")
    env = make_env("FrozenLake-v1")
    assert env.observation_shape == (16,) and env.reset(0).tolist() == [1] + [0] * 15
    same_episode("FrozenLake-v1", seeds=(1, 2))


@pytest.mark.parametrize("version, actions", [("v0", 6), ("v1", 3)])
def test_minatar(version, actions):
    pytest.importorskip("minatar")
    env = make_env(f"MinAtar/Breakout-{version}")
    assert env.observation_shape == (4, 10, 10) and env.actions == actions and set(np.unique(env.reset(0))) == {0, 1}
    for game in ("Breakout", "SpaceInvaders"):
        same_episode(f"MinAtar/{game}-{version}", seeds=(5, 7))


def test_atari():
    pytest.importorskip("ale_py")
    env = make_env("ALE/Pong-v5")
    first = env.reset(1)
    assert first.shape == (4, 84, 84) and first.dtype == np.uint8 and env.actions == 6 and len(np.unique(first)) > 3
    second = env.step(2)[0]
    assert np.array_equal(second[:3], first[1:]) and not np.array_equal(first, second)
    same_episode("ALE/Pong-v5", moves=20)


@pytest.mark.parametrize(
    "name, package, message",
    [
        ("CartPole-v1", "gymnasium", r'needs \'gymnasium\'.*pip install "memcore\[rl\]"'),
        ("MinAtar/Breakout-v1", "minatar", r'needs \'minatar\'.*pip install "memcore\[minatar\]"'),
        ("ALE/Pong-v5", "ale_py", r'needs \'ale_py\'.*pip install "memcore\[atari\]"'),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, package, message):
    import importlib

    real = importlib.import_module

    def missing(module, *rest):
        if module.split(".")[0] == package:
            raise ImportError("not here")
        return real(module, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=message):
        make_env(name)


def test_catch_needs_nothing_else(monkeypatch):
    real = builtins.__import__

    def guarded(name, *rest):
        assert name.split(".")[0] not in ("gymnasium", "minatar", "ale_py"), name
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert make_env("Catch").reset(0).sum() == 2


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "'name' must be an environment's name, got ''"),
        (3, "'name' must be an environment's name, got 3"),
        ("MinAtar/Tetris-v1", "'name' must be MinAtar/ and one of Asterix, .*, got 'MinAtar/Tetris-v1'"),
        ("MinAtar/Breakout", "with -v0 or -v1, got 'MinAtar/Breakout'"),
    ],
)
def test_names_of_nothing_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_env(name)


@pytest.mark.parametrize(
    "name, message",
    [
        ("CartPole-v77", "'name' must be an environment that gymnasium can make, got 'CartPole-v77'"),
        ("NoSuchThing", "'name' must be an environment that gymnasium can make, got 'NoSuchThing'"),
        ("nomodule:Thing-v0", "'name' must be an environment that gymnasium can make, got 'nomodule:Thing-v0'"),
        ("Pendulum-v1", "'Pendulum-v1' must have a Discrete space of actions"),
        ("Blackjack-v1", "'Blackjack-v1' must observe a Box or Discrete space"),
    ],
)
def test_what_gymnasium_lacks_or_agents_cannot_play_is_refused(name, message):
    pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match=message):
        make_env(name)


def test_a_game_that_ale_lacks_is_refused():
    pytest.importorskip("ale_py")
    with pytest.raises(ValueError, match="'name' must be ALE/GAME-v5 with a game that ale-py has, got 'ALE/Chess2000-v5'"):
        make_env("ALE/Chess2000-v5")
