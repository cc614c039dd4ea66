"""NEC and the Q network: values against a float64 loop, gradients, memory by observation, encoders, arguments."""

import pytest
import torch

import memcore
from memcore.models.nec import make_encoder
from memcore.rl import observation_hash

ONE = torch.ones(1, dtype=torch.int64)


def filled(entries=30, seed=0, **more):
    torch.manual_seed(seed)
    model = memcore.NEC((4,), 3, hidden=8, key_width=5, capacity=20, neighbours=6, **more)
    for action in (0, 2):
        seen = torch.randn(entries, 4)
        hashes = torch.tensor([observation_hash(o.numpy()) for o in seen])
        model.remember(seen, torch.full((entries,), action), torch.randn(entries), hashes)
    return model


def by_hand(h, keys, values, k, delta):
    """One value in float64, sorted and summed one neighbour after the other."""
    near = sorted((sum((a - b) ** 2 for a, b in zip(h.tolist(), key.tolist())), v.item()) for key, v in zip(keys, values))[:k]
    weights = [1 / (d + delta) for d, _ in near]
    return sum(w * v for w, (_, v) in zip(weights, near)) / sum(weights)


def entries(model, action):
    n = model.memory.counts[action]
    return model.memory.keys[action, :n].detach().double(), model.memory.values[action, :n, 0].detach().double()


@pytest.mark.parametrize("stored", [3, 30])
def test_values_are_the_inverse_distance_means_of_the_nearest(stored):
    model = filled(stored)
    seen = torch.randn(7, 4)
    found = model(seen)
    h = model.embed(seen).double()
    assert found.known.tolist() == [True, False, True] and torch.equal(found.key, model.embed(seen))
    assert found.values[:, 1].tolist() == [0.0] * 7
    for action in (0, 2):
        keys, values = entries(model, action)
        assert len(keys) == min(stored, 20)
        for b in range(7):
            assert found.values[b, action].item() == pytest.approx(by_hand(h[b], keys, values, 6, 1e-3), rel=1e-4, abs=1e-5)
    actions = torch.tensor([0, 2, 1, 0, 0, 2, 2])
    torch.testing.assert_close(model.value(seen, actions), found.values.gather(1, actions[:, None])[:, 0])
    nearest = found.distances[0, :, 0].double()
    torch.testing.assert_close(nearest, (h[:, None] - entries(model, 0)[0]).square().sum(-1).min(-1).values, rtol=1e-4, atol=1e-6)


def test_an_observation_met_again_moves_its_value_and_takes_the_new_key():
    model = filled(3, alpha=0.25)
    seen, h = torch.randn(1, 4), torch.tensor([77])
    model.remember(seen, ONE, torch.tensor([8.0]), h)
    assert model(seen).values[0, 1].item() == 8.0
    with torch.no_grad():
        model.encoder[-1].weight.mul_(2.0)
    model.remember(seen, ONE, torch.tensor([4.0]), h)
    keys, values = entries(model, 1)
    assert values.tolist() == [7.0] and torch.equal(keys.float(), model.embed(seen).detach())
    model.remember(seen.repeat(2, 1), ONE.repeat(2), torch.tensor([3.0, 3.0]), torch.tensor([77, 78]))  # as one after the other
    assert entries(model, 1)[1].tolist() == [6.0, 3.0]


def test_the_store_is_no_part_of_the_state_dict():
    model = filled()
    assert set(model.state_dict()) == {f"encoder.{k}" for k in model.encoder.state_dict()}


@pytest.mark.parametrize("kind, shape, features", [("mlp", (3, 2), 6), ("minatar", (4, 10, 9), 16 * 8 * 7), ("nature", (4, 84, 84), 3136)])
def test_encoders(kind, shape, features):
    net = make_encoder(kind, shape, 12, 5)
    linear = [m for m in net if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(features, 12), (12, 5)]
    x = torch.randint(0, 2, (2, *shape)).float()
    assert net(x).shape == (2, 5)
    if kind == "nature":  # of bytes: the first layer sees x / 255
        seen = []
        net[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        net(torch.full((1, *shape), 51.0))
        assert torch.allclose(seen[0], torch.tensor(0.2))


def test_bytes_and_floats_give_the_same_values():
    torch.manual_seed(0)
    net = memcore.QNetwork((10, 5), 3, hidden=7, key_width=6)
    board = torch.randint(0, 2, (4, 10, 5), dtype=torch.uint8)
    out = net(board)
    assert torch.equal(out, net(board.float())) and out.shape == (4, 3)
    x = board.double().flatten(1)
    a, b, c = (m.double() for m in (net.encoder[1], net.encoder[3], net.output))
    want = (((x @ a.weight.T + a.bias).clamp_min(0) @ b.weight.T + b.bias).clamp_min(0)) @ c.weight.T + c.bias
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"actions": 0}, ValueError, "'actions' must be at least 1, got 0"),
        ({"capacity": 0}, ValueError, "'capacity' must be at least 1, got 0"),
        ({"capacity": 10.0}, TypeError, "'capacity' must be an int, got float"),
        ({"neighbours": 0}, ValueError, "'neighbours' must be at least 1, got 0"),
        ({"delta": 0.0}, ValueError, "'delta' must be > 0, got 0.0"),
        ({"delta": float("nan")}, ValueError, "'delta' must be finite, got nan"),
        ({"alpha": 1.5}, ValueError, r"'alpha' must be in \(0, 1\], got 1.5"),
        ({"hidden": 0}, ValueError, "'hidden' must be at least 1, got 0"),
        ({"key_width": 0}, ValueError, "'width' must be at least 1, got 0"),
        ({"encoder": "vit"}, ValueError, "'kind' must be 'mlp', 'minatar' or 'nature', got 'vit'"),
        ({"encoder": "minatar"}, ValueError, "'observation_shape' must be \\(channels, height, width\\) .* at least 3 for 'minatar', got \\(4,\\)"),
        ({"encoder": "nature", "observation_shape": (4, 35, 84)}, ValueError, "at least 36 for 'nature'"),
    ],
)
def test_arguments_that_do_not_fit(bad, error, message):
    with pytest.raises(error, match=message):
        memcore.NEC(**{"observation_shape": (4,), "actions": 2, **bad})


def test_inputs_that_do_not_fit():
    model = filled()
    for bad in (torch.zeros(4), torch.zeros(2, 5), torch.zeros(2, 4, 1)):
        with pytest.raises(ValueError, match=r"memcore.NEC: 'observations' must have shape \(B, 4\), got"):
            model(bad)
    with pytest.raises(TypeError, match="'observations' must be a tensor, got list"):
        model([[0.0] * 4])
    one = torch.zeros(1, 4)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=rf"'actions' must be in 0..2, got {bad}..{bad}"):
            model.remember(one, torch.tensor([bad]), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"'actions' must have shape \(B\) = \(1,\)"):
        model.value(one, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"'targets' must have shape \(B\) = \(1,\)"):
        model.remember(one, ONE, torch.zeros(2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"'hashes' must have shape \(B\) = \(1,\)"):
        model.remember(one, ONE, torch.zeros(1), torch.zeros(2, dtype=torch.int64))
