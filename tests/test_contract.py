"""The contract of every operator on every backend, over the table in cases.py."""

import gc
import math
import os
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import memcore
from cases import CASES, DTYPES, Case, Inputs, Sample, as_tuple, assert_close, cast
from paths import PATHS, use_path

PAIRS = [pytest.param(c, s, id=f"{c.name}-{s.id}") for c in CASES for s in c.samples]
# The first sample of each operator is small and ordinary: enough where sizes do not matter.
FIRSTS = [pytest.param(c, c.samples[0], id=c.name) for c in CASES]
DIFFERENTIABLE = [pytest.param(c, s, id=f"{c.name}-{s.id}") for c in CASES if c.differentiable for s in c.samples]
DIFFERENTIABLE_FIRSTS = [pytest.param(c, c.samples[0], id=c.name) for c in CASES if c.differentiable]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def track(case: Case, x: Inputs) -> list[Tensor]:
    """Make the differentiable inputs leaves; those that are there."""
    leaves = [x[k] for k in case.differentiable if x[k] is not None]
    for t in leaves:
        t.requires_grad_()
    return leaves


def cotangents(ys: tuple[Tensor, ...], seed: int = 1) -> list[Tensor | None]:
    """A fixed random gradient for each output, None where it has none."""
    g = torch.Generator().manual_seed(seed)
    draws = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype) if y.is_floating_point() else None for y in ys]
    return [v if y.requires_grad else None for y, v in zip(ys, draws)]


def run(f, case: Case, sample: Sample, x: Inputs, seed: int = 1, only: int | None = None):
    """Outputs, and gradients by argument name (zero where PyTorch says None); `only` one output has a gradient."""
    x = {k: v.detach() if isinstance(v, Tensor) else v for k, v in x.items()}
    leaves = track(case, x)
    names = [k for k in case.differentiable if x[k] is not None]
    ys = as_tuple(f(**x, **sample.options))
    gs = [None if only not in (None, i) else g for i, g in enumerate(cotangents(ys, seed))]
    used = [(y, g) for y, g in zip(ys, gs) if g is not None]
    grads = torch.autograd.grad([y for y, _ in used], leaves, [g for _, g in used], allow_unused=True, materialize_grads=True)
    return ys, dict(zip(names, grads))


@lru_cache(maxsize=None)
def expected(case: Case, sample: Sample, dtype: torch.dtype, only: int | None = None):
    """Outputs and gradients of the reference in float64, on inputs and output gradients rounded to `dtype`."""
    x = {k: cast(v, torch.float64) for k, v in case.inputs(sample, dtype).items()}
    leaves = track(case, x)
    names = [k for k in case.differentiable if x[k] is not None]
    ys = as_tuple(case.reference(**x, **sample.options))
    gs = [None if g is None or only not in (None, i) else cast(cast(g, dtype), torch.float64) for i, g in enumerate(cotangents(ys))]
    used = [(y, g) for y, g in zip(ys, gs) if g is not None]
    if not leaves or not used:
        return ys, {}
    grads = torch.autograd.grad([y for y, _ in used], leaves, [g for _, g in used], allow_unused=True, materialize_grads=True)
    return tuple(y.detach() for y in ys), dict(zip(names, grads))


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


@pytest.mark.parametrize("case, sample", [p for p in DIFFERENTIABLE_FIRSTS if p.values[0].name in ("lrua_write", "split_interface", "ntm_step")])
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
    }
]  # fmt: skip


def bound(case: Case, sample: Sample, x: Inputs):
    """The operator as a function of its differentiable inputs alone, and these."""
    leaves = track(case, x)
    names = [k for k in case.differentiable if x[k] is not None]

    def f(*values):
        ys = as_tuple(case.function(**{**x, **dict(zip(names, values))}, **sample.options))
        return tuple(y for y in ys if y.is_floating_point())

    return f, leaves


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


# The dispatcher -------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """memcore's operators with their raw arguments, as they reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "memcore":
            self.seen.append((op, args))
        return op(*args, **(kwargs or {}))


def raw_calls(case: Case, sample: Sample, dtype: torch.dtype):
    with Calls() as calls:
        x = case.inputs(sample, dtype)
        if case.differentiable:
            run(case.function, case, sample, x)
        else:
            case.function(**x, **sample.options)
    return calls.seen


def leaf(v, tracked: bool):
    return v.detach().clone().requires_grad_(tracked and v.is_floating_point()) if isinstance(v, Tensor) else v


ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("case, sample", PAIRS)
def test_opcheck(case, sample, operators):
    """The forward with its backward traced, and the backward with gradients off; the double backward has its own test."""
    names = [f"{case.name}_fwd", *([f"{case.name}_bwd"] if case.differentiable else [])]
    calls = raw_calls(case, sample, torch.float32)
    assert [op._schema.name for op, _ in calls] == [f"memcore::{n}" for n in names]
    for op, args in calls:
        tracked = bool(case.differentiable) and op._schema.name.endswith("_fwd")
        torch.library.opcheck(op, tuple(leaf(v, tracked) for v in args), test_utils=ALL_CHECKS)


@pytest.mark.parametrize("case, sample", DIFFERENTIABLE_FIRSTS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=lambda d: str(d)[6:])
def test_opcheck_double_backward(case, sample, dtype, operators):
    _, (op, args) = raw_calls(case, sample, dtype)
    torch.library.opcheck(op, tuple(leaf(v, True) for v in args), test_utils=ALL_CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("case, sample", DIFFERENTIABLE)
def test_opcheck_double_backward_everywhere(case, sample, operators):
    _, (op, args) = raw_calls(case, sample, torch.float32)
    torch.library.opcheck(op, tuple(leaf(v, True) for v in args), test_utils=ALL_CHECKS)


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_meta_tensors(case, sample):
    """Shapes and dtypes without data, as `torch.device("meta")` users expect."""
    x = case.inputs(sample, torch.float32)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in x.items()}
    ys = as_tuple(case.function(**meta, **sample.options))
    for y, e in zip(ys, as_tuple(case.reference(**x, **sample.options)), strict=True):
        assert (y.device.type, y.shape, y.dtype) == ("meta", e.shape, e.dtype)


# Compilers and transforms ---------------------------------------------------------------------------------------------


def sized(case: Case, sample: Sample, B: int, N: int, W: int) -> Sample:
    """The sizes that may change without a recompilation."""
    return sample.resized(B=B, N=N, **({} if case.name == "ntm_step" else {"W": W}))


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_compile(case, sample, two_backends):
    """Same outputs and gradients with and without, in one graph that serves other B, N and W.

    The sizes compiled for are all different: the compiler takes equal ones for one and the same.
    """
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (B, N, W) in enumerate([(5, 11, 6), (4, 9, 5), (8, 20, 3)]):
        s = sized(case, sample, B, N, W)
        x = case.inputs(s, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            if case.differentiable:
                ys, grads = run(compiled, case, s, x)
            else:
                ys, grads = as_tuple(compiled(**x, **s.options)), {}
        wanted, wanted_grads = expected(case, s, torch.float32)
        for y, e in zip(ys, wanted, strict=True):
            assert_close(y, e, dtype=torch.float32, **case.tolerance(s, x), what="compiled")
        for k, e in wanted_grads.items():
            assert_close(grads[k], e, dtype=torch.float32, **case.tolerance(s, x, backward=True), what=f"compiled, gradient of {k}")


@pytest.mark.slow
@pytest.mark.parametrize("case, sample", FIRSTS)
def test_compile_with_inductor(case, sample, operators):
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True)
    x = case.inputs(sample, torch.float32)
    ys, grads = run(compiled, case, sample, x) if case.differentiable else (as_tuple(compiled(**x, **sample.options)), {})
    wanted, wanted_grads = expected(case, sample, torch.float32)
    for y, e in zip(ys, wanted, strict=True):
        assert_close(y, e, dtype=torch.float32, **case.tolerance(sample, x), what="compiled")
    for k, e in wanted_grads.items():
        assert_close(grads[k], e, dtype=torch.float32, **case.tolerance(sample, x, backward=True), what=f"compiled, gradient of {k}")


class Module(torch.nn.Module):
    def __init__(self, case, options):
        super().__init__()
        self.f, self.options = case.function, options

    def forward(self, x):
        return as_tuple(self.f(**x, **self.options))


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_export(case, sample, two_backends):
    """An exported program serves other batch sizes and slot counts; with kernels it holds the operator itself."""
    s = sized(case, sample, 3, 7, 4)
    x = {k: v for k, v in case.inputs(s, torch.float32).items() if v is not None}
    auto, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    dynamic = {k: {i: auto if symbol in ("B", "N") else fixed for i, symbol in enumerate(case.shapes[k].split())} for k in x}
    program = torch.export.export(Module(case, s.options), (x,), dynamic_shapes=({**dynamic},))
    kernels = {n.target.name() for n in program.graph.nodes if getattr(n.target, "namespace", "") == "memcore"}
    assert kernels == (set() if two_backends == "reference" else {f"memcore::{case.name}_fwd"})
    other = sized(case, sample, 5, 11, 4)
    y = {k: v for k, v in case.inputs(other, torch.float32).items() if v is not None}
    for a, e in zip(program.module()(y), expected(case, other, torch.float32)[0], strict=True):
        assert_close(a, e, dtype=torch.float32, **case.tolerance(other, y), what="exported")


def objective(case: Case, sample: Sample, x: Inputs):
    """A scalar of all outputs as a function of the differentiable inputs, and these."""
    f, leaves = bound(case, sample, x)
    leaves = tuple(t.detach() for t in leaves)
    cs = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) for y in f(*leaves)]
    return (lambda *v: sum((y * c).sum() for y, c in zip(f(*v), cs))), leaves


def reference_gradients(case, sample, x):
    with use_path("reference"):
        g, leaves = objective(case, sample, x)
        tracked = [t.clone().requires_grad_() for t in leaves]
        return torch.autograd.grad(g(*tracked), tracked, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case, sample", DIFFERENTIABLE_FIRSTS)
def test_func(case, sample, two_backends):
    """grad, vmap, vmap of grad, jvp and jacrev against autograd and loops."""
    x = case.inputs(sample)
    f, leaves = objective(case, sample, x)
    every = tuple(range(len(leaves)))
    wanted = reference_gradients(case, sample, x)
    close = torch.testing.assert_close
    found = torch.func.grad(f, every)(*leaves)
    for a, e in zip(found, wanted, strict=True):
        close(a, e)

    tangents = tuple(torch.randn_like(t) for t in leaves)
    _, slope = torch.func.jvp(f, leaves, tangents)
    close(slope, sum((e * t).sum() for e, t in zip(wanted, tangents)))

    stacked = tuple(torch.stack([t, 0.5 * t, t.flip(0)]) for t in leaves)
    singles = [tuple(t[i] for t in stacked) for i in range(3)]
    close(torch.func.vmap(f)(*stacked), torch.stack([f(*one) for one in singles]))
    by_loop = [torch.func.grad(f, every)(*one) for one in singles]
    for a, e in zip(torch.func.vmap(torch.func.grad(f, every))(*stacked), map(torch.stack, zip(*by_loop)), strict=True):
        close(a, e)

    outputs, _ = bound(case, sample, x)
    jacobian = torch.func.jacrev(lambda *v: outputs(*v)[0], argnums=0)(*leaves)
    close(jacobian, torch.autograd.functional.jacobian(lambda v: outputs(v, *leaves[1:])[0], leaves[0]))


@pytest.mark.parametrize("case, sample", DIFFERENTIABLE_FIRSTS)
def test_func_under_compile(case, sample, operators):
    torch._dynamo.reset()
    x = case.inputs(sample)
    f, leaves = objective(case, sample, x)
    every = tuple(range(len(leaves)))
    compiled = torch.compile(lambda *v: torch.func.grad(f, every)(*v), fullgraph=True, backend="aot_eager")
    for a, e in zip(compiled(*leaves), reference_gradients(case, sample, x), strict=True):
        torch.testing.assert_close(a, e)


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


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(case: Case, sample: Sample, x: Inputs, error, *, argument: str) -> str:
    with pytest.raises(error) as caught:
        case.function(**x, **sample.options)
    message = str(caught.value)
    assert message.startswith(f"memcore.{case.name}: ") and f"'{argument}'" in message, message
    return message


def full(case: Case, sample: Sample) -> tuple[Sample, Inputs]:
    """Inputs with every optional tensor there."""
    x = case.inputs(sample.resized(masked=1), torch.float32)
    if "add" in x and x["add"] is None:
        x["add"] = x["key"].clone()
    return sample, x


TENSORS = [pytest.param(p.values[0], p.values[1], k, id=f"{p.id}-{k}") for p in FIRSTS for k in p.values[0].shapes]


@pytest.mark.parametrize("case, sample, argument", TENSORS)
def test_wrong_shapes(case, sample, argument):
    """One dimension more or less, and every size that another argument settles."""
    sample, x = full(case, sample)
    t = x[argument]
    for wrong in (t[None, None], t[0, 0] if t.dim() == 3 else t[0]):
        message = refused(case, sample, {**x, argument: wrong}, ValueError, argument=argument)
        assert "must have shape (" in message and message.endswith(f"got {tuple(wrong.shape)}"), message
    symbols = case.shapes[argument].split()
    before = " ".join([case.fixed, *(v for k, v in list(case.shapes.items())[: list(case.shapes).index(argument)])]).split()
    for i, symbol in enumerate(symbols):
        if symbol not in before:
            continue
        for wrong in (torch.cat([t, t.narrow(i, 0, 1)], i), t.narrow(i, 0, 0)):
            message = refused(case, sample, {**x, argument: wrong}, ValueError, argument=argument)
            sizes = tuple(t.shape)
            assert f"'{argument}' must have shape ({', '.join(symbols)}) = {sizes} to match '" in message, message
            assert message.endswith(f"got {tuple(wrong.shape)}"), message


@pytest.mark.parametrize("case, sample, argument", TENSORS)
def test_wrong_types(case, sample, argument):
    sample, x = full(case, sample)
    for dtype in (torch.int64, torch.complex64):
        message = refused(case, sample, {**x, argument: x[argument].to(dtype)}, TypeError, argument=argument)
        assert f"got {dtype}" in message
    message = refused(case, sample, {**x, argument: [1.0]}, TypeError, argument=argument)
    assert "got list" in message or "got <class 'list'>" in message, message


@pytest.mark.parametrize("case, sample, argument", TENSORS)
def test_different_devices(case, sample, argument):
    sample, x = full(case, sample)
    if len(case.shapes) == 1:
        return
    message = refused(case, sample, {**x, argument: x[argument].to("meta")}, RuntimeError, argument=argument if argument != next(iter(x)) else list(x)[1])
    assert "cpu" in message and "meta" in message, message


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_a_backend_that_cannot_be_met(case, sample):
    """It raises and names operator and backend; arguments are judged first."""
    x = case.inputs(sample, torch.float32)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in x.items()}
    for choice, values in (("triton", x), ("native", meta), ("triton", meta)):
        with memcore.backend(choice):
            with pytest.raises(RuntimeError, match=rf"memcore\.{case.name}: .*'{choice}'.*{'cpu' if values is x else 'meta'}"):
                case.function(**values, **sample.options)
            with pytest.raises(TypeError, match=rf"memcore\.{case.name}: '{next(iter(x))}'"):
                case.function(**{**values, next(iter(x)): 1.0}, **sample.options)


def test_unknown_backend():
    with pytest.raises(ValueError, match="memcore: backend must be one of auto, reference, native, triton, got 'gpu'"):
        with memcore.backend("gpu"):
            pass


def test_native_library():
    """Whether this run tested kernels at all."""
    if PATHS == ["reference", "registered"]:
        pytest.skip(memcore._backend.native_missing)
    assert len(PATHS) > 1


# Size and time --------------------------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
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
        gc.collect()

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
