"""The MANN's whole recurrence: against float64 autograd through the reference, on random shapes; its edges and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcore import _backend, backend, reference
from memcore.functional import MANNParameters, mann_sequence
from memcore.kernels.mann_sequence.op import _sizes, saved_numbers
from paths import PATHS, use_path

NATIVE = [p for p in PATHS if p != "reference"]
STATE = ("memory", "reads", "read_weights", "usage", "controller")


def draw(seed=0, *, T=5, B=3, X=3, N=7, W=5, K=6, O=4, R=2, layers=1, lengths=None, dtype=torch.float32, **options):
    """(tensors by name, parameters as a flat list, keyword arguments)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    tensors = {
        "input": normal(T, B, X),
        "memory": normal(B, N, W),
        "reads": normal(B, R, W),
        "read_weights": normal(B, R, N).softmax(2),
        "usage": torch.rand(B, N, generator=g, dtype=torch.float64).to(dtype),
        "controller": normal(2 * layers, B, K, scale=0.5),
    }
    flat = [normal(*shape, scale=0.4) for shape in _sizes(X, K, O, W, layers, R, options.get("add") == "separate")]
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths)
    return tensors, flat, options


def call(f, tensors, flat, options):
    pairs = list(zip(flat[::2], flat[1::2]))
    return f(*tensors.values(), MANNParameters(pairs[:-2], pairs[-2], pairs[-1]), **options)


def gradients(f, tensors, flat, options, seed=1, only=None):
    tensors = {k: v.detach().clone().requires_grad_(k != "usage") for k, v in tensors.items()}
    flat = [t.detach().clone().requires_grad_() for t in flat]
    ys = call(f, tensors, flat, options)
    g = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype) for y in ys]
    used = [(y, c) for i, (y, c) in enumerate(zip(ys, cotangents)) if y.requires_grad and only in (None, i)]
    leaves = [t for t in (*tensors.values(), *flat) if t.requires_grad]
    grads = torch.autograd.grad([y for y, _ in used], leaves, [c for _, c in used], allow_unused=True, materialize_grads=True)
    return ys, grads


def compare(drawn, only=None, tolerance=2e-4):
    tensors, flat, options = drawn
    wide = {k: v.double() for k, v in tensors.items()}, [t.double() for t in flat], options
    ys, grads = gradients(mann_sequence, *drawn, only=only)
    expected, expected_grads = gradients(reference.mann_sequence, *wide, only=only)
    names = [*(k for k in tensors if k != "usage"), *(f"parameter {i}" for i in range(len(flat)))]
    assert not ys.usage.requires_grad
    for y, e, name in zip((*ys, *grads), (*expected, *expected_grads), (*ys._fields, *names), strict=True):
        scale = max(1.0, e.abs().max().item() if e.numel() else 0)
        torch.testing.assert_close(y.double(), e, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}")


CASES = {
    "ordinary": {},
    "two_layers": {"layers": 2},
    "three_layers_of_separate_words": {"layers": 3, "add": "separate"},
    "four_heads": {"R": 4, "W": 33},
    "five_heads": {"R": 5, "N": 20},
    "seventeen_heads": {"R": 17, "W": 3, "N": 33},
    "one_head": {"R": 1, "W": 16, "N": 16},
    "reads_first": {"order": "read_write"},
    "reads_first_of_separate_words": {"order": "read_write", "add": "separate", "lengths": [2, 5, 4]},
    "sharp_reads": {"strength": 8.0},
    "sharp_reads_first_of_separate_words": {"strength": 5.0, "order": "read_write", "add": "separate", "lengths": [5, 2, 4]},
    "of_the_least_similar": {"strength": -3.0},
    "nothing_zeroed": {"zero": None, "decay": 0.5},
    "nothing_forgotten": {"decay": 1.0, "T": 9},
    "lengths": {"lengths": [5, 0, 3]},
    "lengths_two_layers": {"lengths": [1, 2, 5, 4, 0], "B": 5, "layers": 2, "T": 6},
    "each_step_kept": {"checkpoint_every": 1, "T": 4},
    "one_copy": {"checkpoint_every": 100, "T": 7},
    "groups": {"B": 19, "T": 3, "K": 37, "W": 20, "N": 40},
    "long": {"T": 35, "B": 2, "lengths": [35, 20]},
    "long_rows": {"N": 130, "W": 70, "K": 50, "X": 57, "O": 9},
    "one_slot": {"N": 1, "W": 1, "K": 1, "X": 1, "O": 1, "R": 1},
    "one_step": {"T": 1},
    "no_step": {"T": 0},
    "no_item": {"B": 0},
}


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, path):
    with use_path(path):
        compare(draw(**CASES[name]))


@pytest.mark.parametrize("name", ["ordinary", "two_layers", "five_heads", "reads_first_of_separate_words", "lengths", "groups"])
def test_float64_to_rounding(name):
    compare(draw(**CASES[name], dtype=torch.float64), tolerance=1e-9)


@pytest.mark.parametrize("only", [0, 1, 2, 3, 5])
def test_one_gradient_alone(only):
    compare(draw(lengths=[5, 2, 3]), only=only)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 9), st.integers(1, 37), st.integers(1, 37), st.integers(1, 20), st.integers(1, 5))
def test_random_shapes(data, T, B, N, W, K, R):
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    more = {"layers": data.draw(st.integers(1, 3)), "checkpoint_every": data.draw(st.none() | st.integers(1, 10))}
    more |= {"add": data.draw(st.sampled_from(["key", "separate"])), "order": data.draw(st.sampled_from(["write_read", "read_write"]))}
    more |= {"zero": data.draw(st.sampled_from(["least_used", None])), "decay": data.draw(st.floats(0, 1)), "lengths": lengths}
    more["strength"] = data.draw(st.sampled_from([1.0, 6.0]))
    seed = data.draw(st.integers(0, 1 << 30))
    # In float64: float32 has cases of its own, and now and then two slots are used so equally that rounding chooses.
    compare(draw(seed, T=T, B=B, N=N, W=W, K=K, R=R, dtype=torch.float64, **more), tolerance=1e-7)


@pytest.mark.parametrize("options", [{}, {"add": "separate", "order": "read_write", "zero": None}, {"strength": 7.0}])
def test_equals_steps_without_kernel(options):
    """The composition of operators that other devices run."""
    tensors, flat, options = draw(layers=2, lengths=[5, 1, 3], **options)
    ys, grads = gradients(mann_sequence, tensors, flat, options)
    with backend("reference"):
        steps, steps_grads = gradients(mann_sequence, tensors, flat, options)
    for a, b in zip((*ys, *grads), (*steps, *steps_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_backend.native is None, reason="the native library is not built")
@pytest.mark.parametrize("path", NATIVE)
def test_slots_never_touched_stay_equal(path):
    """The first memory has equal rows: slots that nobody wrote must go on tying bit by bit, or rounding would choose among them."""
    tensors, flat, options = draw(T=6, B=2, N=37, W=13, R=3, K=20)
    tensors["memory"] = torch.full_like(tensors["memory"], 1e-6)
    tensors["read_weights"], tensors["usage"] = torch.zeros_like(tensors["read_weights"]), torch.zeros_like(tensors["usage"])
    tensors["read_weights"][:, :, 0], tensors["usage"][:, 0] = 1, 1
    with use_path(path):
        found = call(mann_sequence, tensors, flat, options)
    # Steps 1 to 6 took slots 1 to 6.
    for t in (found.memory, found.usage.unsqueeze(2), found.read_weights.mT):
        assert torch.equal(t[:, 7:], t[:, 7:8].expand_as(t[:, 7:])) and not torch.equal(t[:, 6], t[:, 7])


@pytest.mark.skipif(_backend.native is None, reason="the native library is not built")
def test_usage_that_is_not_a_number_counts_as_most_used():
    tensors, flat, options = draw(T=1, B=1, N=5)
    tensors["usage"][0] = torch.tensor([float("nan"), 3.0, 2.0, 2.0, float("nan")])
    found = call(mann_sequence, tensors, flat, options)
    expected = call(reference.mann_sequence, tensors, flat, options)
    torch.testing.assert_close(found.memory, expected.memory)
    assert not torch.allclose(found.memory[0, 2], tensors["memory"][0, 2], atol=0.1)


@pytest.mark.skipif(_backend.native is None, reason="the native library is not built")
def test_threads_change_no_bit():
    drawn = draw(B=21, T=20, N=40, W=20, K=50, X=30, layers=2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ys, grads = gradients(mann_sequence, *drawn)
            found.append([*ys, *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(_backend.native is None, reason="the native library is not built")
@pytest.mark.parametrize("order", ["write_read", "read_write"])
def test_checkpoints_change_no_bit(order):
    tensors, flat, options = draw(T=11, order=order)
    one, *others = (gradients(mann_sequence, tensors, flat, {**options, "checkpoint_every": k})[1] for k in (1, 2, 3, 5, 11, 50))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("T", [5, 21])
def test_without_gradients_the_same(T):
    tensors, flat, options = draw(T=T, lengths=[5, 0, 4], layers=2)
    with torch.no_grad():
        bare = call(mann_sequence, tensors, flat, options)
    ys, _ = gradients(mann_sequence, tensors, flat, options)
    assert all(torch.equal(a, b.detach()) for a, b in zip(bare, ys, strict=True))


def test_without_input_gradient_the_same():
    tensors, flat, options = draw(lengths=[5, 0, 4])
    ys, grads = gradients(mann_sequence, tensors, flat, options)
    leaves = [t.clone().requires_grad_() for t in flat]
    found = call(mann_sequence, tensors, leaves, options)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype) for y in found]
    used = [i for i in range(6) if i != 4]
    alone = torch.autograd.grad([found[i] for i in used], leaves, [cotangents[i] for i in used])
    assert all(torch.equal(a, b) for a, b in zip(alone, grads[5:], strict=True))


def test_state_goes_on():
    tensors, flat, options = draw(T=6)
    whole = call(mann_sequence, tensors, flat, options)
    first = call(mann_sequence, {**tensors, "input": tensors["input"][:4]}, flat, options)
    second = call(mann_sequence, {"input": tensors["input"][4:], **dict(zip(STATE, first[1:]))}, flat, options)
    assert torch.equal(whole.output, torch.cat((first.output, second.output)))
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], second[1:], strict=True))


def test_padding_is_not_looked_at():
    tensors, flat, options = draw(lengths=[5, 0, 3])
    spoilt = {**tensors, "input": tensors["input"].clone()}
    spoilt["input"][:, 1], spoilt["input"][3:, 2] = float("nan"), float("nan")
    (ys, grads), (zs, spoilt_grads) = gradients(mann_sequence, tensors, flat, options), gradients(mann_sequence, spoilt, flat, options)
    assert all(torch.equal(a, b) for a, b in zip((*ys, *grads), (*zs, *spoilt_grads), strict=True))
    assert (ys.output[:, 1] == 0).all() and (ys.output[3:, 2] == 0).all()
    assert all(torch.equal(a[1], tensors[k][1]) for k, a in zip(STATE[:4], ys[1:5], strict=True))


@pytest.mark.parametrize("options", [{}, {"lengths": [5, 0, 3], "add": "separate", "layers": 2}, {"T": 0}])
def test_every_number_is_written(options):
    """Fresh memory holds NaN under deterministic algorithms."""
    drawn = draw(**options)
    ys, grads = gradients(mann_sequence, *drawn)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        poisoned, poisoned_grads = gradients(mann_sequence, *drawn)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip((*ys, *grads), (*poisoned, *poisoned_grads), strict=True))


def test_strides_do_not_matter():
    tensors, flat, options = draw()
    strided = {k: torch.stack((v, torch.full_like(v, float("nan"))), -1)[..., 0] for k, v in tensors.items()}
    a = call(mann_sequence, tensors, flat, options)
    b = call(mann_sequence, strided, [t.mT.contiguous().mT if t.dim() == 2 else t for t in flat], options)
    rounding = {"rtol": 0, "atol": 0} if _backend.native is not None else {"rtol": 1e-5, "atol": 1e-6}  # PyTorch multiplies transposes in another order
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **rounding)


def test_second_derivative():
    tensors, flat, options = draw(T=2, B=2, N=3, W=2, K=2, X=2, O=2, dtype=torch.float64)
    usage = tensors["usage"]
    leaves = [t.requires_grad_() for k, t in tensors.items() if k != "usage"] + [t.requires_grad_() for t in flat]

    def f(input, memory, reads, read_weights, controller, *flat):
        state = {"input": input, "memory": memory, "reads": reads, "read_weights": read_weights, "usage": usage, "controller": controller}
        ys = call(mann_sequence, state, list(flat), options)
        return tuple(y for y, name in zip(ys, ys._fields) if name != "usage")

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    tensors, flat, options = draw(dtype=dtype)
    ys, grads = gradients(mann_sequence, tensors, flat, options)
    wide, wide_grads = gradients(mann_sequence, {k: v.float() for k, v in tensors.items()}, [t.float() for t in flat], options)
    for a, b in zip((*ys, *grads), (*wide, *wide_grads), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.03 * max(1.0, b.abs().max().item()))


def test_torch_func():
    tensors, flat, options = draw(T=2)
    loss = lambda m: call(mann_sequence, {**tensors, "memory": m}, flat, options).output.square().sum()  # noqa: E731
    m = tensors["memory"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(m), m)
    torch.testing.assert_close(torch.func.grad(loss)(tensors["memory"]), expected, rtol=1e-4, atol=1e-4)


def test_opcheck():
    tensors, flat, options = draw(T=3, lengths=[3, 1, 2])
    leaves = [t.requires_grad_(k != "usage") for k, t in tensors.items()]
    leaves.append(torch.cat([t.reshape(-1) for t in flat]).requires_grad_())
    args = (*leaves, options["lengths"], 4, 1, 0.95, 1.0, True, False, True, 2, True, True)
    # Not the comparison after tracing: what is saved has padding that nobody writes.
    torch.library.opcheck(torch.ops.memcore.mann_sequence_fwd.default, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles():
    tensors, flat, options = draw(T=3, lengths=[3, 1, 2], layers=2)
    compiled = torch.compile(lambda *xs: call(mann_sequence, dict(zip(tensors, xs)), list(xs[len(tensors) :]), options), backend="aot_eager", fullgraph=True)

    leaves = [t.clone().requires_grad_(k != "usage") for k, t in tensors.items()] + [t.clone().requires_grad_() for t in flat]
    wrt = [t for t in leaves if t.requires_grad]
    ys = compiled(*leaves)
    expected = call(mann_sequence, dict(zip(tensors, leaves)), leaves[len(tensors) :], options)
    assert not ys.usage.requires_grad
    grads = torch.autograd.grad([y.sum() for y in ys if y.requires_grad], wrt)
    expected_grads = torch.autograd.grad([y.sum() for y in expected if y.requires_grad], wrt)
    for a, b in zip((*ys, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("separate", [False, True])
def test_saved_numbers(separate):
    sizes = {"steps": 10, "batch": 2, "units": 6, "slots": 7, "width": 5, "layers": 2, "heads": 3, "separate": separate, "every": 4}
    tensors, flat, _ = draw(T=10, B=2, R=3, layers=2, add="separate" if separate else "key")
    rest = None, 4, 2, 0.95, 1.0, True, separate, True, 4
    out = torch.ops.memcore.mann_sequence_fwd(*tensors.values(), torch.cat([t.reshape(-1) for t in flat]), *rest, True, True)
    assert out[6].numel() == (sum(saved_numbers(**sizes).values()) if _backend.native else 0)
    out = torch.ops.memcore.mann_sequence_fwd(*tensors.values(), torch.cat([t.reshape(-1) for t in flat]), *rest, False, False)
    assert out[6].numel() == 0


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"order": "both"}, ValueError, "'order' must be 'write_read' or 'read_write', got 'both'"),
        ({"zero": "all"}, ValueError, "'zero' must be 'least_used' or None, got 'all'"),
        ({"add": "word"}, ValueError, "'add' must be 'key' or 'separate', got 'word'"),
        ({"add": "separate"}, ValueError, r"weight of 'parameters.interface' must have shape \(22, 6\), got \(12, 6\)"),
        ({"decay": float("nan")}, ValueError, "'decay' must be finite"),
        ({"strength": float("inf")}, ValueError, "'strength' must be finite"),
        ({"checkpoint_every": 0}, ValueError, "'checkpoint_every' must be at least 1"),
        ({"lengths": torch.tensor([1.0, 2, 3])}, TypeError, "'lengths' must be a tensor of integers"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "'lengths' must have shape"),
        ({"lengths": torch.tensor([1, 2, 6])}, ValueError, "'lengths' must lie in 0..T"),
    ],
)
def test_errors(change, error, text):
    tensors, flat, options = draw()
    with pytest.raises(error, match=f"^memcore.mann_sequence: {text}"):
        call(mann_sequence, tensors, flat, {**options, **change})


@pytest.mark.parametrize("name", ["memory", "reads", "read_weights", "usage", "controller"])
def test_shapes_are_checked(name):
    tensors, flat, options = draw()
    with pytest.raises(ValueError, match=f"^memcore.mann_sequence: '{name}' must have shape"):
        call(mann_sequence, {**tensors, name: tensors[name][:1]}, flat, options)
