"""The contract of every operator on every backend, over the table in cases.py."""

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import memcore
from cases import CASES, DTYPES, Case, Inputs, Sample, as_tuple, assert_close, cast
from conftest import PATHS, use_path

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
