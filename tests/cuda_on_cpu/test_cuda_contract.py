"""The CUDA kernels under the contract of tests/cases.py, run on the CPU: values and every gradient in several orders of threads and
blocks, with memories in shared memory and out of it."""

import pytest
import cuda_shim
import torch

from cases import CASES, as_tuple, assert_close, case as case_of, step
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
# Those of one_sphere tie when they are rounded to float32, which the reference's are not: test_cuda_knn has such rows.
@pytest.mark.parametrize("case, sample", [pytest.param(c, s, id=f"{c.name}-{s.id}") for c, s in MORE if s.id != "one_sphere"])
def test_more_samples(case, sample, limit, backend):
    if LIMITS[limit] not in limits_of(case):
        pytest.skip("its blocks have one form")
    with cuda_shim.shared_limit(LIMITS[limit]):
        check(case, sample, torch.float32)


STEPS = [p for p in PAIRS if p.values[0].name == "ntm_step"]


@pytest.mark.parametrize("way", ["block", "once", "tiles"])
@pytest.mark.parametrize("case, sample", STEPS)
def test_every_way_of_a_step(case, sample, way, backend, monkeypatch):
    monkeypatch.setenv("MEMCORE_NTM_STEP", way)
    check(case, sample, torch.float32)


@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_blocks_of_a_step_that_meet(dtype, order, backend):
    with cuda_shim.schedule(order):
        check(case_of("ntm_step"), step("r3_w2", 3, 2, B=3, N=200, W=130), dtype)  # four tiles, the last one short, the last without a head


def test_what_decides_how_a_step_is_shared_out(backend, monkeypatch):
    case = case_of("ntm_step")

    def launches(way="", processors=cuda_shim.PROCESSORS, dtype=torch.float32, **sizes):
        monkeypatch.setenv("MEMCORE_NTM_STEP", way)
        sample = case.samples[0].resized(**sizes)
        with cuda_shim.recorded() as found, cuda_shim.processors(processors):
            run(case.function, case, sample, case.inputs(sample, dtype))
        return len(found)

    size = {"N": 300, "W": 40}  # 12,000 numbers, two tiles
    assert [launches(way, **size) for way in ("", "block", "once", "tiles")] == [8, 2, 8, 10]
    assert [launches(processors=n, **size) for n in (7, 8)] == [10, 8]  # room for the blocks that wait
    assert [launches(N=n, W=16) for n in (512, 513)] == [2, 8]
    assert [launches(N=n, W=64) for n in (908, 909)] == [8, 10]  # 227 KiB
    assert [launches(N=n, W=64, dtype=torch.bfloat16) for n in (1816, 1817)] == [8, 10]


@pytest.mark.parametrize("way", ["fast", "1", "Block"])
def test_a_wrong_way_of_a_step(way, backend, monkeypatch):
    monkeypatch.setenv("MEMCORE_NTM_STEP", way)
    case = case_of("ntm_step")
    with pytest.raises(RuntimeError, match=f"MEMCORE_NTM_STEP must be 'block', 'once' or 'tiles', got '{way}'"):
        run(case.function, case, case.samples[0], case.inputs(case.samples[0], torch.float32))
