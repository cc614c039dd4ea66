"""The CUDA kernels under the contract of tests/cases.py, run on the CPU: values and every gradient in several orders of threads and
blocks, with memories in shared memory and out of it."""

import pytest
import cuda_shim
import torch

from cases import CASES, as_tuple, assert_close, case as case_of
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


STEPS = [p for p in PAIRS if p.values[0].name == "ntm_step"]


@pytest.mark.parametrize("block", ["0", "1000000"], ids=["tiles", "one_block"])
@pytest.mark.parametrize("case, sample", STEPS)
def test_a_step_by_tiles_and_in_one_block(case, sample, block, backend, monkeypatch):
    monkeypatch.setenv("MEMCORE_STEP_BLOCK", block)
    check(case, sample, torch.float32)


def test_the_block_of_a_step_decides_its_launches(backend, monkeypatch):
    case = case_of("ntm_step")
    sample = case.samples[0].resized(N=300, W=40)  # 12,000 numbers
    found = []
    for block in ("", "11999", "12000"):
        monkeypatch.setenv("MEMCORE_STEP_BLOCK", block)
        with cuda_shim.recorded() as launches:
            run(case.function, case, sample, case.inputs(sample, torch.float32))
        found.append(len(launches))
    assert found == [10, 10, 2]


@pytest.mark.parametrize("block", ["many", "-1", "1e4"])
def test_a_wrong_block_of_a_step(block, backend, monkeypatch):
    monkeypatch.setenv("MEMCORE_STEP_BLOCK", block)
    case = case_of("ntm_step")
    with pytest.raises(RuntimeError, match=f"MEMCORE_STEP_BLOCK must be a whole number >= 0, got '{block}'"):
        run(case.function, case, case.samples[0], case.inputs(case.samples[0], torch.float32))
