"""What every model promises: torch.nn.LSTM's conventions, padded batches, an explicit state, one voice for errors."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from memcore.models import MANN, NTM, LSTMBaseline

X, O = 4, 3
MODELS = {
    "ntm": lambda **k: NTM(X, O, memory_slots=6, slot_width=3, controller_size=5, **k),
    "ntm-heads": lambda **k: NTM(
        X, O, memory_slots=6, slot_width=3, controller_size=5, controller_layers=2, read_heads=2, write_heads=3,
        shift_range=2, memory_init="random", **k,
    ),
    "ntm-feedforward": lambda **k: NTM(
        X, O, memory_slots=6, slot_width=3, controller="feedforward", controller_size=5, controller_layers=2,
        memory_init="learned", first_weighting="uniform", **k,
    ),
    "mann": lambda **k: MANN(X, O, memory_slots=6, slot_width=3, controller_size=5, read_heads=2, **k),
    "mann-per-head": lambda **k: MANN(
        X, O, memory_slots=6, slot_width=3, controller_size=5, read_heads=2, slots="per_head", add="separate", **k
    ),
    "lstm": lambda **k: LSTMBaseline(X, O, hidden_size=5, num_layers=2, **k),
}
pytestmark = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def leaves(state):
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in leaves(part)]


def item(state, b, model):
    """State of one item, kept as a batch of one."""
    dim = 1 if isinstance(model, LSTMBaseline) else 0
    return [leaf.narrow(dim, b, 1) for leaf in leaves(state)]


def close(found, wanted, atol=1e-5):
    found, wanted = leaves(found), leaves(wanted)
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=1e-5, atol=atol)


def test_batch_equals_single_runs(make):
    model, x = make(), torch.randn(9, 16, X)
    output, state = model(x)
    assert output.shape == (9, 16, O)
    for b in range(16):
        single, alone = model(x[:, b : b + 1])
        close(output[:, b : b + 1], single)
        close(item(state, b, model), alone)


def test_lengths_equal_each_item_alone(make):
    model, lengths = make(), [9, 4, 0, 1, 7]
    x = torch.randn(11, 5, X)
    x[torch.arange(11)[:, None] >= torch.tensor(lengths)] = torch.nan
    first = make().initial_state(5)
    for state in (None, type(first)(*copy.deepcopy(model(torch.randn(3, 5, X))[1].detach()))):
        model.zero_grad()
        output, after = model(x, state, lengths=torch.tensor(lengths))
        output.sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        for b, length in enumerate(lengths):
            begin = model.initial_state(5) if state is None else state
            assert not output[length:, b].any()
            if length == 0:
                close(item(after, b, model), item(begin, b, model))
                continue
            dim = 1 if isinstance(model, LSTMBaseline) else 0
            alone_state = None if state is None else narrow(state, dim, b)
            single, alone = model(x[:length, b : b + 1], alone_state)
            close(output[:length, b : b + 1], single)
            close(item(after, b, model), alone)
            single.sum().backward()
        close(grads, [p.grad for p in model.parameters() if p.grad is not None], atol=1e-4)


def narrow(state, dim, b):
    if isinstance(state, Tensor):
        return state.narrow(dim, b, 1)
    parts = [narrow(part, dim, b) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def test_lengths_without_a_full_item_and_all_empty(make):
    model, x = make(), torch.randn(6, 2, X)
    output, state = model(x, lengths=[2, 3])
    close(output[:2], model(x[:2])[0])
    assert output.shape == (6, 2, O) and not output[3:].any()
    output, state = model(x, lengths=[0, 0])
    assert output.shape == (6, 2, O) and not output.any()
    close(state, model.initial_state(2))
    close(model(x, lengths=[6, 6]), model(x))


def test_state_round_trip(make):
    model, x = make(), torch.randn(10, 3, X)
    output, state = model(x)
    first, between = model(x[:4])
    between = pickle.loads(pickle.dumps(between.detach()))
    second, last = model(x[4:], between)
    close(torch.cat((first, second)), output)
    close(last, state)


def test_streaming_equals_the_sequence(make):
    model, x = make(), torch.randn(6, 3, X)
    output, last = model(x)
    state, ys = None, []
    for x_t in x:
        y, state = model.step(x_t, state)
        ys.append(y)
    close(torch.stack(ys), output)
    close(state, last)
    state, ys = None, []
    for x_t in x[:, 1]:
        y, state = model.step(x_t, state)
        ys.append(y)
    close(torch.stack(ys), output[:, 1])


def test_unbatched_and_batch_first(make):
    model, x = make(), torch.randn(6, 3, X)
    output, state = model(x)
    single, alone = model(x[:, 1])
    assert single.shape == (6, O)
    close(single, output[:, 1])
    batch_dim = 1 if isinstance(model, LSTMBaseline) else 0
    close(leaves(alone), [leaf.select(batch_dim, 1) for leaf in leaves(state)])
    close(model(x[:, 1], alone)[0], model(x, state)[0][:, 1])

    other = make(batch_first=True)
    other.load_state_dict(model.state_dict())
    swapped, after = other(x.transpose(0, 1))
    close(swapped, output.transpose(0, 1))
    close(after, state)
    close(other(x[:, 1])[0], single)
    close(other.step(x[0])[0], output[0])
    lengths = [6, 2, 3]
    close(other(x.transpose(0, 1), lengths=lengths)[0], model(x, lengths=lengths)[0].transpose(0, 1))


def test_every_parameter_has_a_finite_gradient(make):
    model = make()
    output, _ = model(torch.randn(6, 3, X))
    output.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_read_feedback_reaches_the_controller_from_step_two_on(make):
    model, x = make(), torch.randn(5, 3, X)
    if isinstance(model, LSTMBaseline):
        pytest.skip("has no memory")
    controller, reads = model.cell.controller, model.cell.feedback_size
    weight = controller.weight_feedback if hasattr(controller, "weight_feedback") else controller.weights[0]
    output, _ = model(x)
    with torch.no_grad():
        weight[-reads:] += 0.5 * torch.randn(reads, weight.shape[1])
    changed, _ = model(x)
    # The first reads that come in are zero, so the first step does not see the change.
    assert torch.equal(changed[0], output[0])
    assert ((changed[1:] - output[1:]).abs().amax(dim=(1, 2)) > 1e-6).all()


def test_same_twice_bit_for_bit(make):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = make()
        output, state = model(torch.randn(6, 3, X))
        output.square().mean().backward()
        results.append([output, *leaves(state), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_call_leaves_nothing_in_the_module(make):
    model, x = make(), torch.randn(6, 3, X)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {m: set(vars(m)) for m in model.modules()}
    first = model(x)[0]
    model.step(x[0])
    assert torch.equal(model(x)[0], first)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {m: set(vars(m)) for m in model.modules()} == attributes


def test_deepcopy_and_state_dict(make):
    model, x = make(), torch.randn(6, 3, X)
    output, state = model(x)
    twin = copy.deepcopy(model)
    other = make()
    assert not torch.equal(other(x)[0], output)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for m in (twin, other):
        assert torch.equal(m(x)[0], output)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x)[0], output)
    copied = copy.deepcopy(state.detach())
    assert type(copied) is type(state)
    close(copied, state.detach(), atol=0)


def test_detach_cuts_the_graph(make):
    model = make()
    _, state = model(torch.randn(3, 2, X))
    assert any(leaf.requires_grad for leaf in leaves(state))
    assert not any(leaf.requires_grad for leaf in leaves(state.detach()))


def test_dtype_and_device_of_the_parameters(make):
    model = make(dtype=torch.float64, device="cpu")
    output, state = model(torch.randn(4, 2, X, dtype=torch.float64))
    assert output.dtype == torch.float64
    assert all(leaf.dtype == torch.float64 for leaf in leaves(state))
    meta = make(device="meta")
    assert all(p.device.type == "meta" for p in [*meta.parameters(), *meta.buffers()])


def test_autocast(make):
    model, x = make(), torch.randn(6, 3, X)
    plain, _ = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = model(x, lengths=[6, 6, 2])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output[:, :2].float(), plain[:, :2], rtol=0.05, atol=0.05)
    if not isinstance(model, LSTMBaseline):
        assert state.memory.dtype == torch.float32
    output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_empty_batch(make):
    model = make()
    if isinstance(model, LSTMBaseline):
        pytest.skip("torch.nn.LSTM takes no empty batch")
    output, state = model(torch.randn(4, 0, X))
    assert output.shape == (4, 0, O) and state.memory.shape == (0, 6, 3)


def test_bad_input(make):
    model, x = make(), torch.randn(6, 3, X)
    name = f"memcore.{type(model).__name__}"
    cases = [
        (ValueError, rf"'input' must have shape \(T, B, X\) or \(T, X\) with X = 4, got \(6, 3, 5\)", lambda: model(torch.randn(6, 3, 5))),
        (ValueError, rf"'input' must have shape \(T, B, X\) or \(T, X\) with X = 4, got \(4,\)", lambda: model(torch.randn(X))),
        (ValueError, r"'input' must have at least one time step, got shape \(0, 3, 4\)", lambda: model(x[:0])),
        (TypeError, "'input' must be a tensor, got list", lambda: model([1.0])),
        (TypeError, r"'input' must have the dtype of the parameters \(torch.float32\), got torch.float64", lambda: model(x.double())),
        (TypeError, r"'input' must have the dtype of the parameters \(torch.float32\), got torch.int64", lambda: model(x.long())),
        (RuntimeError, r"'input' must be on the device of the parameters \(cpu\), got meta", lambda: model(x.to("meta"))),
        (TypeError, "'state' must be a .*State, got int", lambda: model(x, 3)),
        (ValueError, r"'lengths' must lie in 0..T = 0..6, got 7", lambda: model(x, lengths=[6, 7, 1])),
        (ValueError, r"'lengths' must lie in 0..T = 0..6, got -1", lambda: model(x, lengths=torch.tensor([6, -1, 1]))),
        (ValueError, r"'lengths' must have shape \(B\) = \(3,\), got \(2,\)", lambda: model(x, lengths=[6, 1])),
        (TypeError, "'lengths' must hold integers, got torch.float32", lambda: model(x, lengths=torch.ones(3))),
        (ValueError, "'lengths' must be None for an unbatched input, got 3", lambda: model(x[:, 0], lengths=3)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=f"^{name}: {message}$"):
            call()
    with pytest.raises(ValueError, match=rf"^{name}: 'input' must have shape \(B, X\) or \(X\) with X = 4, got \(6, 3, 4\)$"):
        model.step(x)
    for size in ("input_size", "output_size"):
        with pytest.raises(ValueError, match=f"^{name}: '{size}' must be at least 1, got 0$"):
            type(model)(**{"input_size": X, "output_size": O, size: 0})
