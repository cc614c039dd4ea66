"""Training agents: exact resume in mid-episode, repeatability, signals, divergence, the curve, settings; and that they learn."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from memcore.rl import make_agent, make_env, play, train_agent
from memcore.rl.agents import AGENTS
from memcore.rl.experiment import build_agent, configure_agent, load_agent, run_agent
from memcore.train import CheckpointError, Diverged, Interrupted, load_checkpoint, loop
from memcore.tasks import Catch

pytest.importorskip("safetensors")

LOOP = {"period": 3, "learning_starts": 20, "log_every": 16, "epsilon_steps": 40, "epsilon_end": 0.1}
SETTINGS = {
    "nec": {"n_step": 5, "gamma": 0.9, "lr": 1e-3, "memory_lr": 1e-3, "grad_keys": True, "replay": 60, "batch_size": 8, "clip_norm": 1.0},
    "dqn": {"gamma": 0.9, "lr": 1e-3, "replay": 60, "batch_size": 8, "clip_norm": 1.0, "target_every": 4},
}
MODEL = {"nec": {"hidden": 8, "key_width": 4, "capacity": 30, "neighbours": 5}, "dqn": {"hidden": 8, "key_width": 4}}


class Meddling:
    """An environment that calls `act` at its nth move."""

    def __init__(self, inner, nth, act):
        self.inner, self.nth, self.act, self.moves = inner, nth, act, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step(self, action):
        self.moves += 1
        if self.moves == self.nth:
            self.act()
        return self.inner.step(action)


def fresh(kind, seed=0, env=None):
    env = env or Catch()
    torch.manual_seed(seed)
    return make_agent(kind, env, MODEL[kind], SETTINGS[kind]), env


def rows(folder):
    found = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def same(a, b):
    a, b = (load_checkpoint(f / "checkpoint.safetensors") for f in (a, b))
    for group in ("model", "generators", "extra"):
        assert getattr(a, group).keys() == getattr(b, group).keys()
        for key, value in getattr(a, group).items():
            assert torch.equal(value, getattr(b, group)[key]), key
    for i, entries in a.optimizer["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, b.optimizer["state"][i][key]), (i, key)
    for key in ("step", "episode", "losses", "recent", "playing"):
        assert a.meta["train"][key] == b.meta["train"][key], key


@pytest.mark.parametrize(
    "kind, name, signum", [("nec", "Catch", signal.SIGINT), ("dqn", "Catch", signal.SIGTERM), ("nec", "CartPole-v1", signal.SIGINT)]
)
def test_a_run_resumed_in_mid_episode_is_the_uninterrupted_one(tmp_path, kind, name, signum):
    if name != "Catch":
        pytest.importorskip("gymnasium")
    more = {**LOOP, "steps": 130}
    train_agent(*fresh(kind, env=make_env(name)), out=tmp_path / "a", **more)
    agent, env = fresh(kind, env=make_env(name))
    with pytest.raises(Interrupted, match="interrupted at step 87 of 130; saved to .*checkpoint.safetensors") as e:
        train_agent(agent, Meddling(env, 87, lambda: os.kill(os.getpid(), signum)), out=tmp_path / "b", **more)
    assert e.value.signum == signum
    saved = load_checkpoint(tmp_path / "b" / "checkpoint.safetensors")
    assert saved.meta["train"]["playing"] and len(saved.extra["actions"]) > 0
    if kind == "nec":
        assert 0 < len(saved.extra["values"]) and sum(agent.row()["memory"]) > 20
    assert [r["step"] for r in rows(tmp_path / "b")] == [16, 32, 48, 64, 80]
    torch.manual_seed(1234)
    result = train_agent(*fresh(kind, seed=5, env=make_env(name)), out=tmp_path / "b", resume=True, **more)
    assert result.steps == 130 and result.stopped == "steps"
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "b")) == 9
    same(tmp_path / "a", tmp_path / "b")


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_agent(*fresh("nec", seed), steps=60, out=tmp_path / name, seed=seed, **LOOP)
    same(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


def test_an_environment_that_does_not_repeat_itself_is_refused(tmp_path):
    train_agent(*fresh("nec"), steps=40, out=tmp_path, **LOOP)

    class Other(Catch):
        def reset(self, seed):
            super().reset(seed)
            self._ball[1] = (self._ball[1] + 1) % 5
            return self._board()

    with pytest.raises(CheckpointError, match="cannot be resumed: the environment does not repeat its episode"):
        train_agent(*fresh("nec", env=Other()), steps=60, out=tmp_path, resume=True, **LOOP)


def test_resume_refuses_other_settings(tmp_path):
    train_agent(*fresh("nec"), steps=40, out=tmp_path, **LOOP)
    for bad, message in (
        ({"period": 2}, "'period' must be 3 to resume .* got 2"),
        ({"seed": 1}, "'seed' must be 0 to resume"),
        ({"steps": 30}, "'steps' must be at least the 40 done before, got 30"),
    ):
        with pytest.raises(ValueError, match=message):
            train_agent(*fresh("nec"), **{"steps": 60, "out": tmp_path, "resume": True, **LOOP, **bad})
    with pytest.raises(ValueError, match="got no such file"):
        train_agent(*fresh("nec"), steps=60, out=tmp_path / "none", resume=True, **LOOP)


def test_divergence_is_told_and_the_checkpoint_kept(tmp_path, monkeypatch):
    import memcore.rl.loop

    monkeypatch.setattr(memcore.rl.loop, "SAVE_SECONDS", 0.0)
    agent, env = fresh("nec")
    learn, calls = agent.learn, []

    def spoil(generator):
        calls.append(learn(generator))
        return calls[-1] if len(calls) < 8 else math.nan

    agent.learn = spoil
    with pytest.raises(Diverged, match=r"the loss became nan at step 42; the last checkpoint is kept at .*safetensors"):
        train_agent(agent, env, steps=100, out=tmp_path, **LOOP)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").meta["train"]["step"] == 32


def test_a_loss_that_is_not_finite_changes_no_parameter():
    agent, env = fresh("nec")
    train_agent(agent, env, steps=60, **LOOP)
    agent.replay._data["target"][:] = np.inf
    before = [p.clone() for p in (*agent.network.parameters(), agent.network.memory.keys, agent.network.memory.values)]
    assert not math.isfinite(agent.learn(torch.Generator()))
    after = (*agent.network.parameters(), agent.network.memory.keys, agent.network.memory.values)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_rows_hold_every_episode_once_and_what_the_dictionaries_do(tmp_path):
    result = train_agent(*fresh("nec"), steps=100, eval_episodes=3, eval_env=Catch(), out=tmp_path, **LOOP)
    found = rows(tmp_path)
    assert [r["step"] for r in found] == [16, 32, 48, 64, 80, 96, 100]
    ends = [e for r in found for e in r["ends"]]
    assert ends == result.ends == list(range(9, 100, 9)) and result.episodes == found[-1]["episodes"] == 11
    assert all(r in (-1.0, 1.0) for r in result.returns) and len(result.returns) == 11
    for row in found:
        assert row["return"] == pytest.approx(np.mean(row["returns"])) and -1 <= row["eval_return"] <= 1
        assert len(row["memory"]) == 3 and max(row["memory"]) <= 30
    assert found[0]["loss"] is None and found[-1]["loss"] >= 0 and found[0]["nearest"] is None or found[0]["nearest"] >= 0
    assert 0 <= found[-1]["nearest"] <= found[-1]["furthest"] < math.inf
    assert [r["epsilon"] for r in found[:2]] == pytest.approx([1 - 0.9 * 15 / 40, 1 - 0.9 * 31 / 40])


def test_evaluation_changes_nothing(tmp_path):
    for name, episodes in (("a", 0), ("b", 4)):
        train_agent(*fresh("nec"), steps=70, eval_episodes=episodes, eval_env=Catch(), out=tmp_path / name, **LOOP)
    a, b = (load_checkpoint(tmp_path / n / "checkpoint.safetensors") for n in "ab")
    assert all(torch.equal(v, b.extra[k]) for k, v in a.extra.items())
    assert all(torch.equal(v, b.model[k]) for k, v in a.model.items())


def test_play_is_greedy_and_the_same_for_everyone():
    class Left:
        def choose(self, observation, *, explore):
            assert not explore
            return 0

    found = play(Catch(), Left(), episodes=30)
    assert found == play(Catch(), Left(), episodes=30) and set(found) == {-1.0, 1.0}
    assert found != play(Catch(), Left(), episodes=30, seed=1)


def test_it_stops_at_the_time_asked_for():
    result = train_agent(*fresh("dqn"), steps=100, max_minutes=1e-9, **LOOP)
    assert (result.steps, result.stopped) == (1, "max_minutes")


def test_a_run_is_a_folder_that_can_be_loaded(tmp_path):
    config = configure_agent("nec", "Catch", model_options=MODEL["nec"], steps=120, log_every=40, eval_episodes=0)
    result, agent = run_agent(config, tmp_path / "r", test_episodes=4)
    assert json.loads((tmp_path / "r" / "result.json").read_text()) == result
    assert (result["steps"], result["episodes"], result["test"]["episodes"], result["return_51_100"]) == (120, 13, 4, None)
    again, env, loaded = load_agent(tmp_path / "r")
    assert loaded == config
    for seed in range(3):
        o = env.reset(seed)
        assert again.choose(o, explore=False) == agent.choose(o, explore=False)
        assert torch.equal(again.network(torch.from_numpy(o)[None]).values, agent.network(torch.from_numpy(o)[None]).values)
    (tmp_path / "r" / "result.json").unlink()
    with pytest.raises(ValueError, match="'out' must be a folder without a run"):
        run_agent(config, tmp_path / "r")


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"steps": 0}, "'steps' must be an integer >= 1, got 0"),
        ({"period": 1.5}, "'period' must be an integer >= 1, got 1.5"),
        ({"log_every": True}, "'log_every' must be an integer >= 1, got True"),
        ({"learning_starts": -1}, "'learning_starts' must be an integer >= 0, got -1"),
        ({"epsilon_end": 1.5}, r"'epsilon_end' must be in \[0, 1\], got 1.5"),
        ({"epsilon_start": math.nan}, r"'epsilon_start' must be in \[0, 1\], got nan"),
        ({"max_minutes": 0}, "'max_minutes' must be > 0 or None, got 0"),
        ({"resume": True}, "'out' must name the run's folder to resume it"),
        ({"eval_episodes": 2}, "'eval_env' must be an environment of its own"),
    ],
)
def test_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        train_agent(*fresh("dqn"), **{"steps": 20, **LOOP, **bad})


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"lr": 0.0}, "'lr' must be > 0 and finite, got 0.0"),
        ({"memory_lr": math.inf}, "'memory_lr' must be > 0 and finite, got inf"),
        ({"gamma": 1.1}, r"'gamma' must be in \[0, 1\], got 1.1"),
        ({"n_step": 0}, "'n_step' must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "'batch_size' must be an integer >= 1, got 0"),
        ({"replay": 0}, "'replay' must be an integer >= 1, got 0"),
        ({"clip_norm": -1.0}, "'clip_norm' must be > 0 or None, got -1.0"),
    ],
)
def test_learning_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        build_agent(configure_agent("nec", "Catch", **bad))


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="'n_step' is no setting of agent 'dqn'"):
        configure_agent("dqn", "Catch", n_step=3)
    with pytest.raises(ValueError, match="'agent' must be one of nec, dqn, got 'sarsa'"):
        configure_agent("sarsa", "Catch")
    assert set(AGENTS) == {"nec", "dqn"} and loop.CHECKPOINT == "checkpoint.safetensors"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_nec_learns_catch_in_300_episodes(seed):
    """Random play has -0.6; measured 1.0 with all three seeds."""
    config = configure_agent("nec", "Catch", seed=seed, steps=2700, log_every=2700, eval_episodes=0)
    result, agent = run_agent(config, test_episodes=50)
    assert result["episodes"] == 300 and result["test"]["mean"] > 0.5
