"""What agents write, and the gradients of their updates against float64 written out."""

import numpy as np
import pytest
import torch

from memcore.rl import make_agent, make_env, n_step_targets, observation_hash
from memcore.rl.presets import agent_preset


DELTA = 0.1  # so large that keys have a gradient even where the query is one of them


class Scripted:
    """Three observations wide, two actions; rewards and the end as told."""

    observation_shape, observation_dtype, actions = (3,), np.dtype(np.float32), 2


def nec(gamma=0.9, n_step=3, **more):
    torch.manual_seed(0)
    settings = {"lr": 1e-3, "memory_lr": 1e-2, "grad_keys": True, "replay": 50, "batch_size": 8, "clip_norm": None, **more}
    model = {"hidden": 8, "key_width": 4, "capacity": 40, "neighbours": 5, "delta": DELTA}
    return make_agent("nec", Scripted(), model, {"gamma": gamma, "n_step": n_step, **settings})


def episode(agent, length, seed, truncated=False):
    """Play `length` moves; (observations, actions, rewards, values as met, with the last one)."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(length + 1, 3)).astype(np.float32)
    actions, rewards, values = rng.integers(0, 2, length), rng.normal(size=length), []
    for t in range(length):
        agent.choose(seen[t])
        values.append(agent._values[-1])
        if t == length - 1 and truncated:
            found = agent.network(torch.from_numpy(seen[-1:]), touch=False)
            last = found.values[0][found.known].max().item()
        agent.observe(seen[t], int(actions[t]), float(rewards[t]), seen[t + 1], t == length - 1 and not truncated, t == length - 1 and truncated)
    return seen, actions, rewards, [*values, last if truncated else 0.0]


def stored(agent, action):
    memory = agent.network.memory
    n = memory.counts[action]
    return memory.keys[action, :n].detach().clone(), memory.values[action, :n, 0].detach().clone()


@pytest.mark.parametrize("truncated", [False, True])
def test_an_episode_is_written_with_its_targets(truncated):
    agent = nec()
    episode(agent, 9, 0)
    before = [len(stored(agent, a)[0]) for a in (0, 1)]
    seen, actions, rewards, values = episode(agent, 7, 1, truncated)
    targets = n_step_targets(rewards.tolist(), values, 3, 0.9, not truncated)
    if truncated:
        assert values[-1] != 0
    for action in (0, 1):
        keys, written = (x[before[action] :] for x in stored(agent, action))
        at = np.flatnonzero(actions == action)
        np.testing.assert_allclose(written.numpy(), targets[at], rtol=1e-6)
        torch.testing.assert_close(keys, agent.network.embed(torch.from_numpy(seen[at])).detach())
    assert len(agent.replay) == 16 and agent._written == 0 and agent._actions == []


def test_targets_are_written_once_they_are_complete_and_once_only():
    agent = nec()
    episode(agent, 5, 0)
    rng = np.random.default_rng(1)
    seen, values = rng.normal(size=(9, 3)).astype(np.float32), []
    for t in range(8):
        agent.choose(seen[t])
        values.append(agent._values[-1])
        agent.observe(seen[t], t % 2, 1.0, seen[t + 1], t == 7, False)
        if t < 7:
            agent.flush()
            assert len(agent.replay) == 5 + max(0, t - 2)  # V of step t is known: steps up to t - 3 are complete
    assert np.array_equal(agent.replay._data["observation"][5:13], seen[:8]) and len(agent.replay) == 13
    assert agent.replay._data["action"][5:13].tolist() == [0, 1] * 4
    targets = n_step_targets([1.0] * 8, [*values, 0.0], 3, 0.9, True)
    assert len(set(values)) > 5
    np.testing.assert_allclose(agent.replay._data["target"][5:13], targets, rtol=1e-6)


def test_an_observation_seen_twice_is_one_entry():
    agent = nec(n_step=1, gamma=0.0)
    seen = np.ones(3, np.float32)
    for reward in (1.0, 2.0):
        agent.choose(seen)
        agent.observe(seen, 0, reward, seen, True, False)
    assert stored(agent, 0)[1].tolist() == [pytest.approx(1.1)] and len(agent.replay) == 2


@pytest.mark.parametrize("grad_keys", [True, False])
def test_the_gradient_of_nec_reaches_encoder_keys_and_values(grad_keys):
    agent = nec(grad_keys=grad_keys)
    for seed in range(4):
        episode(agent, 9, seed)
    batch = agent.replay.sample(8, torch.Generator().manual_seed(5))
    copy = {k: v.detach().double().requires_grad_() for k, v in agent.network.encoder.named_parameters()}
    tables = [[x.double().requires_grad_() for x in stored(agent, a)] for a in (0, 1)]
    loss = torch.zeros((), dtype=torch.float64)
    for o, a, y in zip(batch["observation"].double(), batch["action"].tolist(), batch["target"].double()):
        h = copy["3.weight"] @ (copy["1.weight"] @ o + copy["1.bias"]).clamp_min(0) + copy["3.bias"]
        d = (h - tables[a][0]).square().sum(-1)
        near = d.topk(5, largest=False).indices
        w = 1 / (d[near] + DELTA)
        loss = loss + ((w * tables[a][1][near]).sum() / w.sum() - y) ** 2 / 8
    loss.backward()
    before = [stored(agent, a) for a in (0, 1)]
    assert agent.learn(torch.Generator().manual_seed(5)) == pytest.approx(loss.item(), rel=1e-4)
    for name, p in agent.network.encoder.named_parameters():
        torch.testing.assert_close(p.grad.double(), copy[name].grad, rtol=1e-3, atol=1e-4 * copy[name].grad.abs().max().item())
    for a in (0, 1):
        for i, moves in enumerate((grad_keys, True)):
            moved, g = stored(agent, a)[i] - before[a][i], tables[a][i].grad
            want = -1e-2 * g.sign() * moves  # Adam's first step
            clear = (g.abs() > 1e-5 * g.abs().max()) | (g == 0)
            assert clear.double().mean() > 0.7  # not those whose gradient is the rounding of h - h_i = 0
            torch.testing.assert_close(moved.double()[clear], want[clear], rtol=1e-2, atol=1e-6)


def dqn(**more):
    torch.manual_seed(0)
    settings = {"gamma": 0.9, "lr": 1e-2, "replay": 50, "batch_size": 16, "clip_norm": None, "target_every": 3, **more}
    agent = make_agent("dqn", Scripted(), {"hidden": 8, "key_width": 4}, settings)
    rng = np.random.default_rng(0)
    for t in range(20):
        o = rng.normal(size=(2, 3)).astype(np.float32)
        agent.observe(o[0], t % 2, float(rng.normal()) * 3, o[1], t % 5 == 4, t % 5 == 3)
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(torch.randn_like(p))
    return agent


@pytest.mark.parametrize("double", [True, False])
def test_the_update_of_dqn_is_its_formula(double):
    agent = dqn(double=double)
    batch = agent.replay.sample(16, torch.Generator().manual_seed(2))
    assert batch["terminal"].sum() not in (0, 16)
    chosen = [net(batch["after"]).argmax(1)[~batch["terminal"]] for net in (agent.network, agent.target)]
    assert not torch.equal(*chosen)

    def q(net, o):
        p = {k: v.detach().double() for k, v in net.state_dict().items()} if net is not copy else copy
        x = (p["encoder.1.weight"] @ o + p["encoder.1.bias"]).clamp_min(0)
        return p["output.weight"] @ (p["encoder.3.weight"] @ x + p["encoder.3.bias"]).clamp_min(0) + p["output.bias"]

    copy = {k: v.detach().double().requires_grad_() for k, v in agent.network.named_parameters()}
    loss, targets = torch.zeros((), dtype=torch.float64), []
    for i in range(16):
        after = batch["after"][i].double()
        best = int((q(agent.network, after) if double else q(agent.target, after)).argmax())
        y = batch["reward"][i].double() + (0.9 * q(agent.target, after)[best] if not batch["terminal"][i] else 0)
        targets.append(y.item())
        e = (q(copy, batch["observation"][i].double())[int(batch["action"][i])] - y).abs()
        loss = loss + (e**2 / 2 if e < 1 else e - 0.5) / 16
    loss.backward()
    assert agent.targets(batch).tolist() == pytest.approx(targets, rel=1e-5)
    assert agent.learn(torch.Generator().manual_seed(2)) == pytest.approx(loss.item(), rel=1e-5)
    for name, p in agent.network.named_parameters():
        torch.testing.assert_close(p.grad.double(), copy[name].grad, rtol=1e-4, atol=1e-6)


def test_the_target_network_follows_at_its_pace():
    agent = dqn()
    g = torch.Generator().manual_seed(0)
    same = lambda: all(torch.equal(a, b) for a, b in zip(agent.network.parameters(), agent.target.parameters()))  # noqa: E731
    told = []
    for _ in range(6):
        agent.learn(g)
        told.append(same())
    assert told == [False, False, True, False, False, True]


def test_rewards_by_their_sign():
    agent = dqn(clip_reward=True)
    assert set(agent.replay._data["reward"][:20].tolist()) == {-1.0, 1.0}


def test_clipping_bounds_the_encoder_s_gradient():
    agent = nec(clip_norm=1e-3)
    for seed in range(3):
        episode(agent, 9, seed)
    agent.learn(torch.Generator().manual_seed(0))
    assert torch.cat([p.grad.flatten() for p in agent.network.parameters()]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_playing_without_exploring_leaves_no_trace():
    agent = nec()
    for seed in range(3):
        episode(agent, 9, seed)
    before = {k: v.clone() for k, v in agent.state().items()}
    assert agent.choose(np.zeros(3, np.float32), explore=False) in (0, 1)
    after = agent.state()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_an_agent_that_knows_nothing_has_no_choice():
    agent = nec()
    assert agent.choose(np.zeros(3, np.float32)) is None and agent.learn(torch.Generator()) is None
    agent.observe(np.zeros(3, np.float32), 1, -5.0, np.zeros(3, np.float32), True, False)
    assert agent.choose(np.zeros(3, np.float32)) == 1  # the only action with a memory, however bad
    assert agent._values == [-5.0]


def test_settings_of_another_agent_are_refused():
    with pytest.raises(ValueError, match="'agent' must be one of nec, dqn, got 'a3c'"):
        make_agent("a3c", Scripted(), {}, {})


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1", "Catch", "MinAtar/Breakout-v1", "ALE/Pong-v5"])
@pytest.mark.parametrize("kind", ["nec", "dqn"])
def test_every_preset_builds(env, kind):
    from memcore.rl.experiment import build_agent, configure_agent

    if env != "Catch":
        pytest.importorskip({"M": "minatar", "AL": "ale_py"}.get(env[:1] if env[0] == "M" else env[:2], "gymnasium"))
    agent, made = build_agent(configure_agent(kind, env))
    assert agent.choose(made.reset(0), explore=False) in (None, *range(made.actions))
    assert agent_preset(env, kind)["train"]["steps"] > 0 and make_env(env).actions == made.actions
    assert observation_hash(made.reset(1)) == observation_hash(make_env(env).reset(1))
