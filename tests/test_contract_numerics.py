"""The contract of every operator on every backend, over the table in cases.py: its numbers.

Values, derivatives, dtypes, repetition, threads, layouts, sizes. How it meets PyTorch is in test_contract_dispatch.py.
"""

import math

import pytest
import torch
from torch import Tensor

import memcore
from cases import CASES, Sample, as_tuple, assert_close, cast
from contract import DIFFERENTIABLE, DIFFERENTIABLE_FIRSTS, FIRSTS, PAIRS, bound, cotangents, each_dtype, expected, run
from memcore.bench.measure import resident
from paths import PATHS, use_path


@each_dtype
@pytest.mark.parametrize("case, sample", PAIRS)
def test_forward(case, sample, dtype, backend):
    x = case.inputs(sample, dtype)
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
    versions = {k: v._version for k, v in x.items() if isinstance(v, Tensor)}
    ys = as_tuple(case.function(**x, **sample.options))
    wanted, _ = expected(case, sample, dtype)
    for i, (y, e) in enumerate(zip(ys, wanted, strict=True)):
        assert y.dtype == (dtype if e.is_floating_point() else e.dtype)
        assert_close(y, e, dtype=dtype, **case.tolerance(sample, before), what=f"output {i}")
    for k, v in before.items():
        if isinstance(v, Tensor):
            assert torch.equal(x[k], v) and x[k]._version == versions[k], f"{k} was written to"


@each_dtype
@pytest.mark.parametrize("case, sample", DIFFERENTIABLE)
def test_gradients(case, sample, dtype, backend):
    x = case.inputs(sample, dtype)
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
    ys, grads = run(case.function, case, sample, x)
    _, wanted = expected(case, sample, dtype)
    tolerance = case.tolerance(sample, before, backward=True)
    assert grads.keys() == wanted.keys()
    for k, e in wanted.items():
        assert grads[k].dtype == dtype
        assert_close(grads[k], e, dtype=dtype, **tolerance, what=f"gradient of {k}")
    for k, v in before.items():
        if isinstance(v, Tensor):
            assert torch.equal(x[k], v), f"{k} was written to"


@pytest.mark.parametrize("case, sample", [p for p in DIFFERENTIABLE_FIRSTS if p.values[0].name in ("lrua_write", "split_interface", "ntm_step", "knn_lookup")])
def test_gradient_of_one_output_alone(case, sample, backend):
    """The other outputs' gradients arrive as None."""
    x = case.inputs(sample, torch.float32)
    for i in range(len(as_tuple(case.function(**x, **sample.options)))):
        _, grads = run(case.function, case, sample, x, only=i)
        _, wanted = expected(case, sample, torch.float32, only=i)
        for k, e in wanted.items():
            assert_close(grads[k], e, dtype=torch.float32, **case.tolerance(sample, x, backward=True), what=f"output {i}, gradient of {k}")


@pytest.mark.parametrize("case, sample", DIFFERENTIABLE_FIRSTS)
def test_gradient_of_one_input_alone(case, sample, backend):
    """What needs no gradient gets none, and what does gets the same."""
    x = case.inputs(sample, torch.float32)
    _, every = run(case.function, case, sample, x)
    for k in every:
        alone = {n: v.detach() if isinstance(v, Tensor) else v for n, v in x.items()}
        alone[k].requires_grad_()
        ys = as_tuple(case.function(**alone, **sample.options))
        used = [(y, g) for y, g in zip(ys, cotangents(ys)) if g is not None]
        (grad,) = torch.autograd.grad([y for y, _ in used], alone[k], [g for _, g in used])
        assert torch.equal(grad, every[k])


# Derivatives ----------------------------------------------------------------------------------------------------------


def tiny(sample: Sample) -> Sample:
    """The sample at sizes that a numerical Jacobian can afford."""
    return sample.resized(B=2, N=4, W=3)


# Samples without kinks: hard zeros are left to the tests of single operators.
SMOOTH = [
    p
    for p in DIFFERENTIABLE
    if p.id
    in {
        "content_addressing-small", "content_addressing-shared_N100_W63", "content_addressing-masked", "content_addressing-no_strength_dot",
        "interpolate-small", "circular_shift-small", "circular_shift-N3_S7", "sharpen-small", "ntm_addressing-small",
        "read-small", "read-shared_N100_W63_H3", "erase_add_write-small", "usage_update-small", "lrua_write-small", "lrua_write-add",
        "lrua_write-keep", "split_interface-r1_w1", "ntm_step-small", "ntm_step-read_first", "ntm_step-no_read_heads",
        "knn_search-small", "knn_search-flat_cosine", "knn_search-ip", "knn_lookup-small", "knn_lookup-softmax_cosine", "knn_lookup-uniform_ip",
    }
]  # fmt: skip


@pytest.mark.parametrize("case, sample", SMOOTH)
def test_gradcheck(case, sample, backend):
    sample = tiny(sample)
    f, leaves = bound(case, sample, case.inputs(sample))
    assert torch.autograd.gradcheck(f, leaves, check_undefined_grad=True)
    # Random projections instead of the whole Jacobian: the second derivative of the big operators is slow in Python.
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("case, sample", DIFFERENTIABLE_FIRSTS)
def test_gradgradcheck_in_full(case, sample, operators):
    sample = sample.resized(B=1, N=3, W=2)
    f, leaves = bound(case, sample, case.inputs(sample))
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("case, sample", DIFFERENTIABLE_FIRSTS)
def test_third_derivative(case, sample, operators):
    """Of a quadratic form of the outputs along a direction, against the reference."""

    def third(path):
        with use_path(path):
            f, leaves = bound(case, sample, case.inputs(sample))
            ys = f(*leaves)
            total = sum((y.square() * c).sum() for y, c in zip(ys, cotangents(ys)))
            for order in range(3):
                grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
                total = sum((g * c).sum() for g, c in zip(grads, cotangents(grads, seed=order)) if c is not None)
            return [g.detach() for g in grads]

    for a, e in zip(third(operators), third("reference"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7 * e.abs().max().item())


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_autocast(case, sample, two_backends):
    """Float32 inputs give the same float32 numbers and gradients as without, bfloat16 inputs bfloat16."""
    x = case.inputs(sample, torch.float32)

    def autocast(**values):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.function(**values)

    plain, found = as_tuple(case.function(**x, **sample.options)), as_tuple(autocast(**x, **sample.options))
    for y, e in zip(found, plain, strict=True):
        assert y.dtype == e.dtype and torch.equal(y, e)
    half = as_tuple(autocast(**{k: cast(v, torch.bfloat16) for k, v in x.items()}, **sample.options))
    assert all(y.dtype == (torch.bfloat16 if e.is_floating_point() else e.dtype) for y, e in zip(half, plain, strict=True))
    if case.differentiable:
        grads, wanted = run(autocast, case, sample, x)[1], run(case.function, case, sample, x)[1]
        assert all(torch.equal(grads[k], e) for k, e in wanted.items())


@pytest.mark.parametrize("case, sample", FIRSTS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32)], ids=["f32_f64", "bf16_f16", "bf16_f32"])  # fmt: skip
def test_mixed_dtypes(case, sample, dtypes, two_backends):
    """One argument in another dtype: everything in the common one; each gradient in its argument's own."""
    one, other = dtypes
    common = torch.promote_types(one, other)
    base = case.inputs(sample, one)
    for k in case.shapes:
        if base[k] is None or not base[k].is_floating_point() or len(case.shapes) == 1:
            continue
        x = {**base, k: case.inputs(sample, other)[k]}
        ys = as_tuple(case.function(**x, **sample.options))
        wanted = as_tuple(case.reference(**{n: cast(v, torch.float64) for n, v in x.items()}, **sample.options))
        for y, e in zip(ys, wanted, strict=True):
            assert y.dtype == (common if e.is_floating_point() else torch.int64)
            assert_close(y, e, dtype=common, **case.tolerance(sample, x), what=f"{k} in {other}")
        if case.differentiable:
            _, grads = run(case.function, case, sample, x)
            assert {n: g.dtype for n, g in grads.items()} == {n: x[n].dtype for n in grads}


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_repeats_bitwise(case, sample, backend):
    s = sample.resized(B=3, N=257, W=33)
    x = case.inputs(s, torch.float32)
    assert torch.are_deterministic_algorithms_enabled()

    def once():
        return run(case.function, case, s, x) if case.differentiable else (as_tuple(case.function(**x, **s.options)), {})

    ys, grads = once()
    again, grads_again = once()
    assert all(torch.equal(a, b) for a, b in zip(ys, again, strict=True))
    assert all(torch.equal(grads[k], grads_again[k]) for k in grads)


@pytest.mark.skipif("native" not in PATHS[-1], reason="the native library is not built; the reference's threads are PyTorch's")
@pytest.mark.parametrize("sizes", [{"B": 9, "N": 300, "W": 40}, {"B": 1, "N": 20000, "W": 33}], ids=["many", "long"])
@pytest.mark.parametrize("case, sample", FIRSTS)
def test_threads_bitwise(case, sample, sizes, backend):
    if backend == "reference":
        return
    s = sample.resized(**sizes)
    x = case.inputs(s, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case.function, case, s, x) if case.differentiable else (as_tuple(case.function(**x, **s.options)), {}))
    torch.set_num_threads(1)
    for ys, grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ys, results[0][0], strict=True))
        for k, g in grads.items():
            assert torch.equal(g, results[0][1][k]), f"gradient of {k}"


# Layouts --------------------------------------------------------------------------------------------------------------


def gap(dtype):
    return True if dtype == torch.bool else math.nan


def transposed(t):
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def stepped(t):
    """Every second element of every dimension of a larger tensor, from offset 1."""
    big = torch.full([2 * n + 1 for n in t.shape], gap(t.dtype), dtype=t.dtype)
    view = big[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    view.copy_(t)
    return view


def offset(t):
    """Contiguous, one element into its storage, not aligned to any vector."""
    big = torch.full([t.numel() + 2], gap(t.dtype), dtype=t.dtype)
    view = big[1:-1].view(t.shape)
    view.copy_(t)
    return view


def padded_rows(t):
    """Inner dimension contiguous, rows far apart."""
    big = torch.full([*t.shape[:-1], t.shape[-1] + 3], gap(t.dtype), dtype=t.dtype)
    view = big[..., 1 : t.shape[-1] + 1]
    view.copy_(t)
    return view


def expanded(dim):
    def apply(t):
        return t.narrow(dim, 0, 1).expand_as(t) if t.shape[dim] else t

    return apply


LAYOUTS = {
    "transposed": transposed, "stepped": stepped, "offset": offset, "padded_rows": padded_rows,
    "expanded_first": expanded(0), "expanded_last": expanded(-1), "expanded_middle": expanded(1),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case, sample", FIRSTS)
def test_strides(case, sample, layout, backend):
    """Any strides, NaN in the gaps, for inputs and for the gradients of outputs; the same as contiguous copies."""
    lay = LAYOUTS[layout]
    s = sample.resized(B=3, N=21, W=9, shared=int(layout == "stepped"))
    x = {k: lay(v) if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in case.inputs(s, torch.float32).items()}
    flat = {k: v.contiguous().clone() if isinstance(v, Tensor) else v for k, v in x.items()}
    if case.name == "content_addressing":
        mask = torch.rand(3, 21, generator=torch.Generator().manual_seed(0)) < 0.7
        x["mask"] = lay(mask)
        flat["mask"] = x["mask"].clone(memory_format=torch.contiguous_format)
    results = []
    for values, place in ((x, lay), (flat, lambda t: t)):
        leaves = [values[k].detach().requires_grad_() for k in case.differentiable if values[k] is not None]
        names = [k for k in case.differentiable if values[k] is not None]
        ys = as_tuple(case.function(**{**values, **dict(zip(names, leaves))}, **s.options))
        used = [(y, g) for y, g in zip(ys, cotangents(ys)) if g is not None]
        gs = [(lay(g) if place is lay else lay(g).contiguous()) if g.dim() > 1 else g for _, g in used]
        grads = torch.autograd.grad([y for y, _ in used], leaves, gs, allow_unused=True, materialize_grads=True) if used else ()
        results.append((ys, grads))
    (ys, grads), (wanted, wanted_grads) = results
    for y, e in zip(ys, wanted, strict=True):
        assert_close(y, e, dtype=torch.float32, **case.tolerance(s, flat), what=layout)
    for k, g, e in zip([k for k in case.differentiable if x[k] is not None], grads, wanted_grads, strict=False):
        assert_close(g, e, dtype=torch.float32, **case.tolerance(s, flat, backward=True), what=f"{layout}, gradient of {k}")


@pytest.mark.parametrize("case, sample", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_results_alias_nothing(case, sample, dtype, two_backends):
    x = case.inputs(sample, dtype)
    ys = [y for y in as_tuple(case.function(**x, **sample.options)) if y.numel()]
    places = [y.untyped_storage().data_ptr() for y in ys]
    inputs = [v.untyped_storage().data_ptr() for v in x.values() if isinstance(v, Tensor) and v.numel()]
    assert not set(places) & set(inputs)
    elements = [(p, i) for p, y in zip(places, ys) for i in indices(y)]
    assert len(elements) == len(set(elements)), "outputs overlap"


def indices(y: Tensor) -> list[int]:
    """Where in its storage each element of `y` lies."""
    at = torch.full((), y.storage_offset())
    for n, step in zip(y.shape, y.stride()):
        at = at[..., None] + torch.arange(n) * step
    return at.flatten().tolist()


@pytest.mark.parametrize("sizes", [{"B": 0}, {"N": 0}, {"H": 0, "Hr": 0}, {"W": 0}, {"B": 0, "N": 0}], ids=["B0", "N0", "H0", "W0", "B0_N0"])
@pytest.mark.parametrize("case, sample", FIRSTS)
def test_empty(case, sample, sizes, backend):
    """Right shape, dtype and requires_grad; the gradients that remain are those of the reference."""
    if "I" in case.fixed or case.name == "split_interface":
        sizes = {k: v for k, v in sizes.items() if k in "BNW"}
    s = sample.resized(**sizes)
    for dtype in (torch.float32, torch.float16):
        x = case.inputs(s, dtype)
        wanted, wanted_grads = expected(case, s, dtype)
        if not case.differentiable:
            ys, grads = as_tuple(case.function(**x, **s.options)), {}
        else:
            ys, grads = run(case.function, case, s, x)
            assert all(y.requires_grad for y in ys if y.is_floating_point())
        for y, e in zip(ys, wanted, strict=True):
            assert y.dtype == (dtype if e.is_floating_point() else torch.int64)
            assert_close(y, e, dtype=dtype, **case.tolerance(s, x), what="output")
        for k, e in wanted_grads.items():
            assert grads[k].dtype == dtype
            assert_close(grads[k], e, dtype=dtype, **case.tolerance(s, x, backward=True), what=f"gradient of {k}")


# Size and time --------------------------------------------------------------------------------------------------------


@pytest.mark.growth
@pytest.mark.skipif(resident() is None, reason="needs /proc")
@pytest.mark.parametrize("case, sample", FIRSTS)
def test_memory_does_not_grow(case, sample, operators):
    """Forward and backward, thousands of times (hundreds where the operators run in Python)."""
    s = sample.resized(B=1, N=64, W=16)
    x = case.inputs(s, torch.float32)
    calls = 2000 if operators.startswith("native") else 200

    def loop(n):
        for _ in range(n):
            if case.differentiable:
                run(case.function, case, s, x)
            else:
                case.function(**x, **s.options)

    loop(calls // 4)
    before = resident()
    loop(calls)
    # One leaked tensor of [64, 16] floats a call would be 8 MB at 2000 calls.
    assert resident() - before < 3e6


@pytest.mark.parametrize("name", ["sharpen", "content_addressing", "read", "ntm_addressing", "least_used"])
def test_a_million_slots(name, backend):
    case = next(c for c in CASES if c.name == name)
    s = case.samples[0].resized(B=1, H=1, N=1_000_000, W=2)
    x = case.inputs(s, torch.float32)
    (y,) = as_tuple(case.function(**x, **s.options))
    (e,) = as_tuple(case.reference(**{k: cast(v, torch.float64) for k, v in x.items()}, **s.options))
    assert_close(y, e, dtype=torch.float32, **case.tolerance(s, x), what=name)
    if name in ("sharpen", "content_addressing", "ntm_addressing"):
        assert abs(y.double().sum().item() - 1) < 1e-5


def test_offsets_past_two_to_the_31(backend):
    """Two batch items 2^31 elements apart; only the touched pages of the storage exist."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        big = torch.empty(2**31 + 4096, dtype=torch.float16)
    except RuntimeError as e:
        pytest.skip(f"no room for 4 GB of address space: {e}")
    memory = big.as_strided((2, 20, 10), (2**31, 10, 1))
    memory.copy_(torch.randn(2, 20, 10))
    weights = torch.rand(2, 3, 20, dtype=torch.float16)
    flat = memory.clone()
    assert torch.equal(memcore.functional.read(memory, weights), memcore.functional.read(flat, weights))
    key = flat[:, :3].clone()
    assert torch.equal(memcore.functional.content_addressing(key, memory), memcore.functional.content_addressing(key, flat))
    erase = torch.rand(2, 3, 10, dtype=torch.float16)
    written = memcore.functional.erase_add_write(flat, weights, erase, erase)
    assert torch.equal(memcore.functional.erase_add_write(memory, weights, erase, erase), written)
    memcore.functional.erase_add_write_(memory, weights, erase, erase)
    assert torch.equal(memory, written)
