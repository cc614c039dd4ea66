"""What is special to the NTM: its equations, its first state, its controllers, its options."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import memcore
from memcore.models import NTM, NTMCell, NTMState
from memcore.models._recurrent import MemoryCell

SMALL = {"memory_slots": 6, "slot_width": 3, "controller_size": 5}


def parameters(model):
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def softplus(x):
    return np.log1p(np.exp(x))


def lstm_layer(gates, c):
    i, f, o, g = np.split(gates, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def address(memory, raw, previous, shift_range):
    """Equations (5)-(9) of the paper for one head, slot by slot."""
    slots, width = memory.shape
    key, rest = raw[:width], raw[width:]
    strength, gate = softplus(rest[0]), sigmoid(rest[1])
    shift, gamma = softmax(rest[2 : 2 + 2 * shift_range + 1]), 1 + softplus(rest[-1])
    similarity = np.array([row @ key / (np.linalg.norm(row) * np.linalg.norm(key)) for row in memory])
    mixed = gate * softmax(strength * similarity) + (1 - gate) * previous
    moved = np.zeros(slots)
    for i in range(slots):
        for offset in range(-shift_range, shift_range + 1):
            moved[(i + offset) % slots] += mixed[i] * shift[offset + shift_range]
    sharp = moved**gamma
    return sharp / sharp.sum()


def loop(model, x):
    """The model as written in the paper, one item and one slot at a time, in float64: outputs, memories, weights."""
    cell, p = model.cell, parameters(model)
    reads_n, writes_n, width, k = cell.read_heads, cell.write_heads, cell.slot_width, cell.controller.output_size
    layers = sum(name.startswith("cell.controller.biases") for name in p)
    outputs, memories, weightings = [], [], []
    for b in range(x.shape[1]):
        memory = p.get("cell.first_memory", np.full((cell.memory_slots, width), 1e-6))
        if "cell.first_logits" in p:
            weights = [softmax(row) for row in p["cell.first_logits"]]
        else:
            weights = [np.eye(cell.memory_slots)[0] for _ in range(reads_n + writes_n)]
        reads = p.get("cell.first_reads", np.zeros((0, width)))
        if layers:
            hs, cs = list(p["cell.controller.start"][0::2]), list(p["cell.controller.start"][1::2])
        ys = []
        for x_t in x[:, b]:
            if layers:
                gates = x_t @ p["cell.controller.weight_input"] + p["cell.controller.biases.0"]
                gates = gates + np.concatenate([hs[0], reads.ravel()]) @ p["cell.controller.weights.0"]
                hs[0], cs[0] = lstm_layer(gates, cs[0])
                for i in range(1, layers):
                    gates = np.concatenate([hs[i], hs[i - 1]]) @ p[f"cell.controller.weights.{i}"]
                    hs[i], cs[i] = lstm_layer(gates + p[f"cell.controller.biases.{i}"], cs[i])
                h = hs[-1]
            else:
                h = p["cell.controller.first.weight"] @ x_t + p["cell.controller.first.bias"]
                h = np.tanh(h + reads.ravel() @ p["cell.controller.weight_feedback"])
            raw = p["cell.interface.weight"] @ h + p["cell.interface.bias"]
            if cell.controller_clip is not None:
                raw = raw.clip(-cell.controller_clip, cell.controller_clip)
            size = width + 3 + 2 * cell.shift_range + 1
            heads, erases, adds = [], [], []
            for head in range(reads_n + writes_n):
                heads.append(raw[:size])
                raw = raw[size:]
                if head >= reads_n:
                    erases.append(sigmoid(raw[:width]))
                    adds.append(raw[width : 2 * width])
                    raw = raw[2 * width :]
            assert len(raw) == 0
            weights = [address(memory, r, w, cell.shift_range) for r, w in zip(heads, weights)]
            before = memory
            for w, e in zip(weights[reads_n:], erases):
                memory = memory * (1 - np.outer(w, e))
            for w, a in zip(weights[reads_n:], adds):
                memory = memory + np.outer(w, a)
            source = memory if cell.order == "write_read" else before
            reads = np.array([w @ source for w in weights[:reads_n]]).reshape(reads_n, width)
            ys.append(p["output.weight"] @ np.concatenate([h, reads.ravel()]) + p["output.bias"])
        outputs.append(ys)
        memories.append(memory)
        weightings.append(weights)
    return np.array(outputs).swapaxes(0, 1), np.array(memories), np.array(weightings)


def shake(model):
    """Random values in every parameter, so that none is at a special one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.6)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_init": "learned", "first_weighting": "onehot"},
        {"memory_init": "random", "order": "read_write"},
        {"read_heads": 3, "write_heads": 2, "shift_range": 2, "memory_init": "random"},
        {"controller": "feedforward", "memory_init": "learned"},
        {"controller_layers": 3, "memory_init": "random", "controller_clip": 0.4},
        {"write_heads": 0, "memory_init": "random"},
        {"read_heads": 0, "write_heads": 2},
        {"shift_range": 0, "memory_init": "learned"},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_equals_the_paper_in_float64(options):
    torch.manual_seed(0)
    model = shake(NTM(4, 2, dtype=torch.float64, **SMALL, **options))
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    output, state = model(x)
    expected, memory, weights = loop(model, x.numpy())
    for found, wanted in ((output, expected), (state.memory, memory), (state.weights, weights)):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-6, atol=1e-8)


def test_constant_memory_trains_without_nan():
    torch.manual_seed(0)
    model = NTM(4, 2, **SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4))[0].square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 50)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_heads_start_focused_and_hold_their_focus():
    model = NTM(4, 2, read_heads=2, write_heads=2, shift_range=2, **SMALL)
    first = model.initial_state(2).weights
    assert torch.allclose(first.sum(-1), torch.ones(2, 4))
    assert (first[..., 0] > 0.95).all() and (first > 0).all()
    bias = model.cell.interface.bias.detach()[None]
    pieces = memcore.functional.split_interface(bias, read_heads=2, write_heads=2, shift_range=2)
    assert torch.allclose(pieces.gate, torch.full((1, 4), 1 / (1 + math.exp(2))))
    assert torch.allclose(pieces.shift, torch.full((1, 4, 5), 0.2)) and (pieces.add == 0).all()


def test_random_memory_is_part_of_the_model():
    torch.manual_seed(0)
    model = NTM(4, 2, memory_init="random", first_weighting="uniform", **SMALL)
    assert torch.equal(model.initial_state(2).memory, model.initial_state(2).memory)
    assert "cell.first_memory" in model.state_dict() and "cell.first_memory" not in dict(model.named_parameters())
    assert torch.equal(model.initial_state(1).weights, torch.full((1, 2, 6), 1 / 6))


class Gated(nn.Module):
    """A controller of a user's own, with a nested state."""

    def __init__(self, input_size):
        super().__init__()
        self.input_size, self.output_size = input_size, 5
        self.cell = nn.GRUCell(input_size, 5)

    def initial_state(self, batch_size):
        return (torch.zeros(batch_size, 5),), torch.zeros(batch_size)

    def forward(self, x, state):
        (h,), count = state
        h = self.cell(x, h)
        return h, ((h,), count + 1)


def test_a_controller_of_ones_own():
    torch.manual_seed(0)
    model = NTM(4, 2, controller=Gated(4 + 3), memory_slots=6, slot_width=3)
    x = torch.randn(5, 2, 4)
    output, state = model(x, lengths=[5, 3])
    assert torch.equal(state.controller[1], torch.tensor([5.0, 3.0]))
    single, alone = model(x[:3, 1])
    assert torch.allclose(output[:3, 1], single, atol=1e-6)
    assert torch.allclose(state.controller[0][0][1], alone.controller[0][0], atol=1e-6)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match=r"'controller' must take inputs of size .* = 7, got one with input_size = 9"):
        NTM(4, 2, controller=Gated(9), memory_slots=6, slot_width=3)
    with pytest.raises(TypeError, match="'controller' must have an attribute 'output_size', Linear has none"):
        NTM(4, 2, controller=nn.Linear(7, 5))


def test_cell_is_the_model_without_its_output_layer():
    torch.manual_seed(0)
    model = NTM(4, 2, **SMALL)
    assert isinstance(model.cell, NTMCell)
    x = torch.randn(2, 4)
    features, state = model.cell(x)
    assert features.shape == (2, model.cell.output_size) == (2, 5 + 3)
    y, after = model.step(x)
    assert torch.equal(model.output(features), y) and torch.equal(state.memory, after.memory)
    one, _ = model.cell(x[0])
    assert torch.allclose(one, features[0], atol=1e-6)


def test_trace_follows_the_forward_pass():
    torch.manual_seed(0)
    model = NTM(4, 2, read_heads=2, **SMALL)
    x = torch.randn(5, 3, 4)
    output, state = model(x)
    trace = model.trace(x)
    sizes = {
        "memory": (6, 3), "reads": (2, 3), "read_weights": (2, 6), "write_weights": (1, 6), "add": (1, 3), "erase": (1, 3), "output": (2,),
    }
    assert {k: tuple(v.shape) for k, v in trace.items()} == {k: (5, 3, *v) for k, v in sizes.items()}
    assert not any(v.requires_grad for v in trace.values())
    # A trace goes step by step, the forward pass through the whole sequence at once.
    torch.testing.assert_close(trace["output"], output.detach())
    torch.testing.assert_close(trace["memory"][-1], state.memory.detach())
    torch.testing.assert_close(torch.cat((trace["read_weights"], trace["write_weights"]), 2)[-1], state.weights.detach())
    before = torch.cat((torch.full((1, 3, 6, 3), 1e-6), trace["memory"][:-1]))
    w, e, a = trace["write_weights"][:, :, 0, :, None], trace["erase"], trace["add"]
    assert torch.allclose(before * (1 - w * e) + w * a, trace["memory"], atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"read_heads": 0, "write_heads": 0}, "'read_heads' \\+ 'write_heads' must be at least 1, got 0"),
        ({"read_heads": -1}, "'read_heads' must be at least 0, got -1"),
        ({"memory_slots": 0}, "'memory_slots' must be at least 1, got 0"),
        ({"shift_range": -1}, "'shift_range' must be at least 0, got -1"),
        ({"controller": "gru"}, "'controller' must be 'lstm', 'feedforward' or a torch.nn.Module, got 'gru'"),
        ({"controller_layers": 0}, "'controller_layers' must be at least 1, got 0"),
        ({"memory_init": "zero"}, "'memory_init' must be 'constant', 'learned' or 'random', got 'zero'"),
        ({"first_weighting": "uniform"}, "'first_weighting' must be 'learned' or 'onehot' with memory_init='constant'"),
        ({"order": "read"}, "'order' must be 'write_read' or 'read_write', got 'read'"),
        ({"controller_clip": 0}, "'controller_clip' must be positive or None, got 0"),
        ({"read_gate_bias": float("inf")}, "'read_gate_bias' must be finite, got inf"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^memcore.NTM: {message}"):
        NTM(4, 2, **options)


def test_bad_state():
    model = NTM(4, 2, **SMALL)
    x, state = torch.randn(5, 3, 4), model.initial_state(3)
    with pytest.raises(TypeError, match="^memcore.NTM: 'state' must be a NTMState, got tuple$"):
        model(x, tuple(state))
    with pytest.raises(ValueError, match=r"^memcore.NTM: 'state.memory' must have shape \(3, 6, 3\), got \(2, 6, 3\)$"):
        model(x, model.initial_state(2))
    with pytest.raises(ValueError, match=r"^memcore.NTM: 'state.controller\[1\]' must have shape \(3, 5\), got nothing$"):
        model(x, state._replace(controller=state.controller[:1]))
    with pytest.raises(ValueError, match=r"^memcore.NTM: 'state.controller\[2\]' must have shape nothing, got \(3, 5\)$"):
        model(x, NTMState(*state[:3], state.controller + state.controller[:1]))


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize("lengths", [None, [5, 0, 2]], ids=["full", "lengths"])
def test_whole_sequence_equals_steps(controller, lengths, monkeypatch):
    """The operator for the whole recurrence and the loop over time give the same outputs, states and gradients."""
    torch.manual_seed(0)
    model = NTM(4, 2, read_heads=2, controller=controller, controller_layers=2, controller_clip=1.5, memory_init="learned", **SMALL)
    x, found = torch.randn(5, 3, 4), []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(NTMCell, "sequence", MemoryCell.sequence)
        model.zero_grad()
        output, state = model(x, lengths=lengths)
        (output.square().sum() + state.memory.sum() + state.weights.square().sum()).backward()
        found.append([output.detach(), state.memory.detach(), state.reads.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
