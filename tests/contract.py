"""What the contract tests share: operators paired with their samples, one call with gradients, what the reference says."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from memcore.functional import knn_lookup
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


def check_row_gradients(call: Callable[[str, str, tuple], Sequence[Tensor]], shape: tuple[int, ...]) -> None:
    """Row-sparse gradients of searches by call(operator, "bwd" or "rows", arguments): as many rows as there are neighbours, whatever was found;
    together they are the dense ones. Padding and repeated rows add nothing."""
    query, keys, values = torch.randn(*shape, 7, 4), torch.randn(*shape, 50, 4), torch.randn(*shape, 50, 3)
    found = knn_lookup(query, keys, values, 6, count=torch.tensor([50, 4] if shape else [4]))
    grads = [torch.randn(t.shape) for t in (found.output, found.weights, found.distances)]
    none = [None] * 4
    dense = call("knn_lookup", "bwd", (*grads[:2], None, grads[2], found.indices, query, keys, values, *none, 6, 0, 0, 0.1))
    dquery, rows, *sparse = call("knn_lookup", "rows", (*grads, found.indices, query, keys, values, 0, 0, 0.1))
    assert torch.equal(dquery, dense[0]) and rows.shape == (len(shape) + 1, found.indices.numel())
    for made, like, wanted in zip(sparse, (keys, values), dense[1:]):
        whole = torch.sparse_coo_tensor(rows, made, like.shape, check_invariants=True).coalesce()
        assert torch.equal(whole.to_dense(), wanted)
        blocks = found.indices if shape else found.indices[None]
        used = {(*([a] if shape else []), n) for a, block in enumerate(blocks) for n in block.flatten().tolist() if n >= 0}
        assert {tuple(r) for r in whole.indices().T.tolist()} == used
    of_search = call("knn_search", "rows", (grads[2], found.indices, query, keys, 1))
    wanted = call("knn_search", "bwd", (grads[2], None, found.indices, query, keys, *none, 6, 1))
    assert torch.equal(torch.sparse_coo_tensor(of_search[1], of_search[2], keys.shape, check_invariants=True).to_dense(), wanted[1])
