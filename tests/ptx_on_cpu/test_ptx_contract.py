"""The contract of tests/cases.py through the PTX that Triton and nvcc compile the GPU kernels to, in up to three orders of warps."""

import pytest
import torch
from torch import Tensor

import ptx_suite
from cases import S, assert_close, case as case_of, step
from contract import PAIRS, expected, run
from ptx_machine import ORDERS, Kernel, PtxError
from ptx_program import Module
from ptx_suite import BACKENDS, COMPOSED, Emulator, emulated, missing, nvcc_ptx, operators

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Samples of so many rows are slow. Triton's knn_lookup launches the kernels of knn_search.
LONG = {
    "triton": {"knn_search": 300, "knn_lookup": 63, "ntm_step": 1000},
    "cuda": {"knn_search": 1000, "knn_lookup": 1000},
}


def plan():
    """On sm_80 every sample in float32, and one in each narrow type; of Triton's composed operators, which take it seconds to compile, every third
    sample in float32, of nvcc's, whose sources run all of them in test_cuda_contract, every second. The rest, sm_90 and long samples are slow."""
    for backend in BACKENDS:
        for p in PAIRS:
            case, sample = p.values
            if case.name not in operators(backend):
                continue
            at = case.samples.index(sample)
            for dtype in DTYPES:
                for arch in (80, 90):
                    composed = backend == "triton" and case.name in COMPOSED
                    narrow = at == (2 if dtype == "bfloat16" else 3) and not composed
                    stride = 3 if composed else 2 if backend == "cuda" else 1
                    usual = arch == 80 and (dtype == "float32" and at % stride == 0 or narrow)
                    slow = not usual or sample.sizes.get("N", 0) >= LONG[backend].get(case.name, 1000000)
                    marks = [pytest.mark.slow] if slow else []
                    if missing(backend):
                        marks.append(pytest.mark.skip(reason=missing(backend)))
                    yield pytest.param(backend, arch, case, sample, DTYPES[dtype], id=f"{backend}-sm_{arch}-{p.id}-{dtype}", marks=marks)


def check(emulator, case, sample, dtype):
    x = case.inputs(sample, dtype)
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
    with emulated(emulator) as calls:
        ys, grads = run(case.function, case, sample, x)
    assert f"{case.name}_fwd" in calls and f"{case.name}_bwd" in calls
    wanted, wanted_grads = expected(case, sample, dtype)
    for i, (y, e) in enumerate(zip(ys, wanted, strict=True)):
        assert_close(y, e, dtype=dtype, **case.tolerance(sample, before), what=f"output {i}")
    for k, e in wanted_grads.items():
        assert_close(grads[k], e, dtype=dtype, **case.tolerance(sample, before, backward=True), what=f"gradient of {k}")
    for k, v in before.items():
        assert not isinstance(v, Tensor) or torch.equal(x[k], v), f"{k} was written to"


@pytest.mark.parametrize("backend, arch, case, sample, dtype", list(plan()))
def test_contract(backend, arch, case, sample, dtype, pytestconfig):
    """Each operator's first sample in all orders, the others without the middle one: one warp at a time, as the last, but the other way round."""
    every = sample is case.samples[0] or pytestconfig.getoption("--slow") or pytestconfig.getoption("markexpr")
    check(Emulator(backend, arch, orders=ORDERS if every else ORDERS[::2]), case, sample, dtype)


# Four tiles, the last one short; the last block without a head.
MEETING = step("r3_w2", 3, 2, B=3, N=200, W=130)
needs_nvcc = pytest.mark.skipif(bool(missing("cuda")), reason=missing("cuda"))


@needs_nvcc
@pytest.mark.parametrize("arch, dtype", [(80, "float32"), pytest.param(90, "bfloat16", marks=pytest.mark.slow)])
def test_blocks_of_a_step_that_meet(arch, dtype):
    check(Emulator("cuda", arch), case_of("ntm_step"), MEETING, DTYPES[dtype])


@needs_nvcc
@pytest.mark.parametrize("ordered, instead", [("red.release.gpu", "red.relaxed.gpu"), ("ld.acquire.gpu", "ld.relaxed.gpu")])
def test_a_meeting_without_its_order_is_a_race(ordered, instead, monkeypatch):
    text = nvcc_ptx("ntm_step_tiles", 80)
    assert ordered in text
    module = Module(text.replace(ordered, instead))
    monkeypatch.setattr(ptx_suite, "nvcc_kernel", lambda op, symbol, arch: Kernel(module, symbol))
    with pytest.raises(PtxError, match="race"):
        check(Emulator("cuda", 80, orders=("lockstep",)), case_of("ntm_step"), MEETING, torch.float32)


@needs_nvcc
@pytest.mark.parametrize("queries, rows", [(1, 1200), (6, 600)])
def test_lists_of_a_search_that_fill(queries, rows):
    """Two shards on one multiprocessor, whose lists are cut before the end, by the block and by its warps."""
    import cuda_shim

    with cuda_shim.processors(1):
        check(Emulator("cuda", 80), case_of("knn_search"), S("full", None, {"k": 3}, B=queries, N=rows, W=3), torch.float32)
