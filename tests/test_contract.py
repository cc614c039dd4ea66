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
