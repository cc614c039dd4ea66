"""What the contract tests share: operators paired with their samples, one call with gradients, what the reference says."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from cases import CASES, DTYPES, Case, Inputs, Sample, as_tuple, cast

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
    draws = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y) if y.is_floating_point() else None for y in ys]
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


def bound(case: Case, sample: Sample, x: Inputs):
    """The operator as a function of its differentiable inputs alone, and these."""
    leaves = track(case, x)
    names = [k for k in case.differentiable if x[k] is not None]

    def f(*values):
        ys = as_tuple(case.function(**{**x, **dict(zip(names, values))}, **sample.options))
        return tuple(y for y in ys if y.is_floating_point())

    return f, leaves
