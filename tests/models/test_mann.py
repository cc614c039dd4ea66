"""What is special to the MANN: its equations and its options."""

import itertools

import numpy as np
import pytest
import torch

import memcore
from memcore import _backend
from memcore import functional as F
from memcore.models import MANN, MANNCell

SMALL = {"memory_slots": 6, "slot_width": 3, "controller_size": 5, "read_heads": 2}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loop(model, x):
    """The model as written in the paper, one item and one head at a time, in float64."""
    cell = model.cell
    p = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    n, width, heads = cell.memory_slots, cell.slot_width, cell.read_heads
    k = cell.controller.output_size
    outputs, memories, usages, reading = [], [], [], []
    for b in range(x.shape[1]):
        memory, usage = np.full((n, width), 1e-6), np.eye(n)[0]
        w_read, reads = np.tile(np.eye(n)[0], (heads, 1)), np.zeros((heads, width))
        h = c = np.zeros(k)
        ys = []
        for x_t in x[:, b]:
            gates = x_t @ p["cell.controller.weight_input"] + p["cell.controller.biases.0"]
            gates = gates + np.concatenate([h, reads.ravel()]) @ p["cell.controller.weights.0"]
            i, f, o, g = np.split(gates, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            raw = p["cell.interface.weight"] @ h + p["cell.interface.bias"]
            words = np.tanh(raw[:-heads]).reshape(-1, width)
            alpha = sigmoid(raw[-heads:])
            key, word = words[:heads], words[-heads:]
            ranked = sorted(range(n), key=lambda slot: (usage[slot], slot))
            before, memory = memory, memory.copy()
            if cell.zero:
                memory[ranked[0]] = 0
            w_write = np.zeros((heads, n))
            for head in range(heads):
                marked = {"one": ranked[:1], "n_shared": ranked[:heads], "per_head": [ranked[head]]}[cell.slots]
                least = np.array([float(slot in marked) for slot in range(n)])
                w_write[head] = alpha[head] * w_read[head] + (1 - alpha[head]) * least
            for head in range(heads):
                memory = memory + np.outer(w_write[head], word[head])
            source = memory if cell.order == "write_read" else before
            w_read = np.zeros((heads, n))
            for head in range(heads):
                scores = np.zeros(n)
                for slot in range(n):
                    norms = np.linalg.norm(key[head]) * np.linalg.norm(source[slot])
                    scores[slot] = key[head] @ source[slot] / norms if norms > 0 else 0
                w_read[head] = np.exp(cell.strength * scores) / np.exp(cell.strength * scores).sum()
            reads = w_read @ source
            usage = cell.decay * usage + w_read.sum(0) + w_write.sum(0)
            ys.append(p["output.weight"] @ np.concatenate([h, reads.ravel()]) + p["output.bias"])
        outputs.append(ys)
        memories.append(memory)
        usages.append(usage)
        reading.append(w_read)
    return np.array(outputs).swapaxes(0, 1), np.array(memories), np.array(usages), np.array(reading)


@pytest.mark.parametrize(
    "slots, add, zero, order, strength",
    [
        *itertools.product(("one", "n_shared", "per_head"), ("key", "separate"), ("least_used", None), ("write_read", "read_write"), (1.0,)),
        *itertools.product(("one", "per_head"), ("separate",), ("least_used",), ("write_read", "read_write"), (6.0,)),
    ],
)
def test_equals_the_paper_in_float64(slots, add, zero, order, strength):
    torch.manual_seed(0)
    model = MANN(4, 3, dtype=torch.float64, slots=slots, add=add, zero=zero, order=order, decay=0.9, strength=strength, **SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
    x = torch.randn(12, 2, 4, dtype=torch.float64)
    output, state = model(x)
    found = (output, state.memory, state.usage, state.read_weights)
    for f, wanted in zip(found, loop(model, x.numpy())):
        np.testing.assert_allclose(f.detach().numpy(), wanted, rtol=1e-6, atol=1e-8)


def test_first_state():
    state = MANN(4, 3, **SMALL).initial_state(2)
    assert torch.equal(state.memory, torch.full((2, 6, 3), 1e-6))
    assert torch.equal(state.usage, torch.eye(6)[:1].expand(2, 6))
    assert torch.equal(state.read_weights, torch.eye(6)[:1].expand(2, 2, 6))
    assert not state.reads.any() and not any(s.any() for s in state.controller)


def test_usage_carries_no_gradient_and_everything_else_does():
    torch.manual_seed(0)
    model = MANN(4, 3, **SMALL)
    _, state = model(torch.randn(5, 2, 4))
    assert not state.usage.requires_grad
    assert state.memory.requires_grad and state.reads.requires_grad and state.read_weights.requires_grad


def test_trace_follows_the_forward_pass():
    torch.manual_seed(0)
    model = MANN(4, 3, **SMALL)
    x = torch.randn(5, 3, 4)
    output, state = model(x)
    trace = model.trace(x)
    sizes = {
        "memory": (6, 3), "reads": (2, 3), "read_weights": (2, 6), "write_weights": (2, 6), "add": (2, 3), "usage": (6,), "output": (3,),
    }
    assert {k: tuple(v.shape) for k, v in trace.items()} == {k: (5, 3, *v) for k, v in sizes.items()}
    # A trace goes step by step, the forward pass through the whole sequence at once.
    torch.testing.assert_close(trace["output"], output.detach())
    torch.testing.assert_close(trace["memory"][-1], state.memory.detach())
    torch.testing.assert_close(trace["usage"][-1], state.usage)
    # Both heads write into slot 1 at first: slot 0 has been used by decree.
    first = trace["write_weights"][0]
    assert torch.allclose(first[..., 0] + first[..., 1], torch.ones(3, 2)) and first[..., 1].min() > 0


def test_the_whole_sequence_equals_the_steps(monkeypatch):
    torch.manual_seed(0)
    model = MANN(4, 3, add="separate", **SMALL)
    x, lengths = torch.randn(7, 3, 4), [7, 0, 4]

    def run():
        output, state = model(x, lengths=lengths)
        loss = output.square().sum() + state.memory.sum() + sum(s.square().sum() for s in state.controller)
        return [output, *state[:4], *state.controller, *torch.autograd.grad(loss, list(model.parameters()))]

    if _backend.native is not None:
        called = []
        sequence = F.mann_sequence
        monkeypatch.setattr(F, "mann_sequence", lambda *args, **options: called.append(1) or sequence(*args, **options))
    whole = run()
    assert _backend.native is None or called
    with memcore.backend("reference"):
        steps = run()
    for a, b in zip(whole, steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_streaming_equals_the_whole_sequence():
    torch.manual_seed(0)
    model = MANN(4, 3, **SMALL)
    x = torch.randn(9, 2, 4)
    whole, last = model(x)
    state, outputs = None, []
    for x_t in x:
        y, state = model.step(x_t, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs), whole)
    torch.testing.assert_close(state.memory, last.memory)


def test_a_controller_of_ones_own_goes_step_by_step():
    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.output_size = inner, inner.output_size
            self.hoist, self.step, self.initial_state = inner.hoist, inner.step, inner.initial_state

    torch.manual_seed(0)
    model = MANN(4, 3, **SMALL)
    x = torch.randn(5, 2, 4)
    output, _ = model(x)
    model.cell.controller = Plain(model.cell.controller)
    assert model.cell.sequence(x, model.initial_state(2), None, model.output) is None
    torch.testing.assert_close(model(x)[0], output)


def test_cell_gives_the_features():
    torch.manual_seed(0)
    model = MANN(4, 3, **SMALL)
    assert isinstance(model.cell, MANNCell)
    features, _ = model.cell(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"^memcore.MANNCell: 'input' must have shape \(B, X\) or \(X\) with X = 4, got \(2, 5\)$"):
        model.cell(torch.ones(2, 5))
    assert torch.equal(model.output(features), model.step(torch.ones(2, 4))[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"read_heads": 0}, "'read_heads' must be at least 1, got 0"),
        ({"decay": 1.5}, "'decay' must lie in 0..1, got 1.5"),
        ({"strength": float("nan")}, "'strength' must be finite, got nan"),
        ({"order": "read"}, "'order' must be 'write_read' or 'read_write', got 'read'"),
        ({"add": "word"}, "'add' must be 'key' or 'separate', got 'word'"),
        ({"zero": "all"}, "'zero' must be 'least_used' or None, got 'all'"),
        ({"slots": "two"}, "'slots' must be 'one', 'n_shared' or 'per_head', got 'two'"),
        ({"slots": "per_head", "memory_slots": 3}, "'memory_slots' must be at least read_heads = 4 with slots='per_head', got 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^memcore.MANN: {message}$"):
        MANN(4, 3, **options)
