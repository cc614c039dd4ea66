"""The contract of every operator on every backend, over the table in cases.py: how it meets PyTorch and its caller.

Schemas, meta tensors, compilers, transforms, refusals. Its numbers are in test_contract_numerics.py.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import memcore
from cases import Case, Inputs, Sample, as_tuple, assert_close
from contract import DIFFERENTIABLE, DIFFERENTIABLE_FIRSTS, FIRSTS, PAIRS, bound, expected, run
from paths import PATHS, use_path


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


# Operators that call all others, and those that are traced otherwise.
COMPOSED = ("ntm_step", "knn_lookup", "least_used")
SOME = [pytest.param(*p.values, id=p.id, marks=() if p.id in COMPOSED else pytest.mark.slow) for p in DIFFERENTIABLE_FIRSTS]


@pytest.mark.parametrize("case, sample", SOME)
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


BY_REFERENCE = [pytest.param(*p.values, "reference", id=f"{p.id}-reference", marks=() if p.id in COMPOSED else pytest.mark.slow) for p in FIRSTS]
REGISTERED = [pytest.param(*p.values, PATHS[-1], id=f"{p.id}-{PATHS[-1]}") for p in FIRSTS]


@pytest.mark.parametrize("case, sample, backend", [*BY_REFERENCE, *REGISTERED], indirect=["backend"])
def test_compile(case, sample, backend):
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
    dynamic = {k: {i: auto if symbol in ("B", "N", "Q") else fixed for i, symbol in enumerate(case.shapes[k].split())} for k in x}
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
