"""n-step targets against a plain loop, the hash of an observation, the replay ring, the exploration rate."""

import numpy as np
import pytest
import torch

from memcore.rl import Replay, epsilon_at, n_step_targets, observation_hash


def by_loop(rewards, values, n, gamma, terminal):
    """The definition, one term after the other."""
    out = []
    for t in range(len(rewards)):
        total, discount, j = 0.0, 1.0, t
        while j < len(rewards) and j < t + n:
            total += discount * rewards[j]
            discount *= gamma
            j += 1
        if not (terminal and j == len(rewards)):
            total += discount * values[j]
        out.append(total)
    return np.array(out)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("steps, n", [(1, 1), (1, 5), (6, 1), (6, 3), (6, 6), (6, 7), (200, 50), (0, 3)])
def test_targets_are_the_sums_of_their_definition(steps, n, gamma, terminal):
    rng = np.random.default_rng(steps * 100 + n)
    rewards, values = rng.normal(size=steps), rng.normal(size=steps + 1)
    found = n_step_targets(rewards.tolist(), values.tolist(), n, gamma, terminal)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_loop(rewards, values, n, gamma, terminal), rtol=1e-12, atol=1e-12)


def test_a_terminal_state_has_no_future_and_a_time_limit_has():
    rewards, values = [1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 5.0]
    assert n_step_targets(rewards, values, 10, 0.5, terminal=True).tolist() == [1.75, 1.5, 1.0]
    assert n_step_targets(rewards, values, 10, 0.5, terminal=False).tolist() == [1.75 + 0.625, 1.5 + 1.25, 1.0 + 2.5]
    assert n_step_targets(rewards, values, 1, 0.5, terminal=True).tolist() == [1 + 4.5, 1 + 4.5, 1.0]
    assert values == [9.0, 9.0, 9.0, 5.0]


def test_targets_of_bad_input():
    with pytest.raises(ValueError, match="'values' must have one entry more than 'rewards' \\(2\\), got 2"):
        n_step_targets([1.0, 1.0], [0.0, 0.0], 3, 0.9, True)
    with pytest.raises(ValueError, match="'n' must be at least 1, got 0"):
        n_step_targets([1.0], [0.0, 0.0], 0, 0.9, True)


def test_the_hash_is_of_what_is_observed_not_of_how_it_lies_in_memory():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 6)).astype(np.float32)
    h = observation_hash(a)
    assert -(2**63) <= h < 2**63 and torch.tensor(h).item() == h
    wide = np.zeros((4, 12), np.float32)
    wide[:, ::2] = a
    for same in (a.copy(), np.asfortranarray(a), wide[:, ::2]):
        assert observation_hash(same) == h
    b = a.copy()
    b[2, 3] = np.nextafter(b[2, 3], np.float32(9))
    for other in (b, a[::-1], a.reshape(6, 4), a.astype(np.float64)):
        assert observation_hash(other) != h
    zero = np.zeros(3, np.float32)
    assert observation_hash(zero) == observation_hash(-zero) != observation_hash(zero + 1)
    boards = {observation_hash(np.array([i >> k & 1 for k in range(16)], np.uint8)) for i in range(1 << 12)}
    assert len(boards) == 1 << 12


def test_a_full_replay_forgets_the_oldest_and_draws_uniformly():
    replay = Replay(5, {"x": ((2,), np.float32), "a": ((), np.int64)})
    with pytest.raises(ValueError, match="'sample' must come after the first 'add'"):
        replay.sample(1, torch.Generator())
    for i in range(8):
        replay.add(x=np.array([i, -i]), a=i)
        assert len(replay) == min(i + 1, 5)
    batch = replay.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(batch["x"], torch.stack([batch["a"], -batch["a"]], 1).float())
    counts = batch["a"].bincount(minlength=8)
    assert counts[:3].sum() == 0 and (counts[3:] - 1000).abs().max() < 150  # five standard deviations
    again = replay.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(again["a"], batch["a"])


def test_a_replay_put_back_goes_on_as_the_first():
    first, second = (Replay(5, {"a": ((), np.int64)}) for _ in range(2))
    for i in range(7):
        first.add(a=i)
    second.load_state({k: v.clone() for k, v in first.state().items()})
    for replay in (first, second):
        replay.add(a=7)
    drawn = [r.sample(50, torch.Generator().manual_seed(1))["a"] for r in (first, second)]
    assert torch.equal(*drawn) and set(drawn[0].tolist()) == {3, 4, 5, 6, 7}


@pytest.mark.parametrize("capacity, error", [(0, ValueError), (2.0, TypeError)])
def test_a_replay_needs_room(capacity, error):
    with pytest.raises(error, match="memcore.rl.Replay: 'capacity' must be"):
        Replay(capacity, {})


def test_epsilon_goes_down_in_a_line_and_stays():
    assert [epsilon_at(s, 1.0, 0.2, 4) for s in (0, 1, 2, 3, 4, 9)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert epsilon_at(0, 1.0, 0.2, 0) == 0.2
