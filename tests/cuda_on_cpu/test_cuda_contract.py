"""The CUDA kernels under the contract of tests/cases.py, run on the CPU: values and every gradient in several orders of threads and
blocks, with memories in shared memory and out of it."""

import pytest
import cuda_shim
import torch

from cases import CASES, as_tuple, assert_close
from contract import PAIRS, expected, run
from shim_calls import LIMITS as BYTES, MORE, limits_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERATORS = cuda_shim.operators()
SAMPLES = [p for p in PAIRS if p.values[0].name in OPERATORS]
LIMITS = dict(zip(("all", "vectors", "nothing"), BYTES))


def check(case, sample, dtype):
    x = case.inputs(sample, dtype)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    ys, grads = run(case.function, case, sample, x)
    wanted, wanted_grads = expected(case, sample, dtype)
    for i, (y, e) in enumerate(zip(ys, wanted, strict=True)):
        assert y.dtype == (dtype if e.is_floating_point() else e.dtype)
        assert_close(y, e, dtype=dtype, **case.tolerance(sample, before), what=f"output {i}")
    assert grads.keys() == wanted_grads.keys()
    for k, e in wanted_grads.items():
        assert grads[k].dtype == dtype
        assert_close(grads[k], e, dtype=dtype, **case.tolerance(sample, before, backward=True), what=f"gradient of {k}")
    for k, v in before.items():
        if isinstance(v, torch.Tensor):
            assert ((x[k] == v) | ((x[k] != x[k]) & (v != v))).all(), f"{k} was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case, sample", SAMPLES)
def test_contract(case, sample, dtype, backend):
    check(case, sample, dtype)


@pytest.mark.parametrize("order", ["reverse", "random:1"])
@pytest.mark.parametrize("case, sample", SAMPLES)
def test_orders(case, sample, order, backend):
    with cuda_shim.schedule(order):
        check(case, sample, torch.float32)


@pytest.mark.parametrize("limit", ["vectors", "nothing"])
@pytest.mark.parametrize("case, sample", SAMPLES)
def test_little_shared_memory(case, sample, limit, backend):
    if LIMITS[limit] not in limits_of(case):
        pytest.skip("its blocks have one form")
    with cuda_shim.shared_limit(LIMITS[limit]):
        check(case, sample, torch.float32)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("case, sample", [pytest.param(c, s, id=f"{c.name}-{s.id}") for c, s in MORE])
def test_more_samples(case, sample, limit, backend):
    if LIMITS[limit] not in limits_of(case):
        pytest.skip("its blocks have one form")
    with cuda_shim.shared_limit(LIMITS[limit]):
        check(case, sample, torch.float32)
