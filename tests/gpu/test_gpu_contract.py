"""The contract of tests/cases.py on a GPU, on both backends and on what `auto` chooses: values, gradients, layouts, determinism, errors."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import memcore
from cases import CASES, assert_close, case as case_of
from contract import FIRSTS, PAIRS, expected, run
from gpu_device import BACKENDS, call, each_operator, moved, operators, settled, through

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan():
    """(device, backend, case, sample): everything on the GPU, each operator's first sample on the CPU."""
    for p in PAIRS:
        case, sample = p.values
        for backend in (*BACKENDS, "auto"):
            if backend == "auto" or case.name in operators(backend):
                yield pytest.param("cuda", backend, case, sample, id=f"cuda-{backend}-{p.id}", marks=pytest.mark.gpu)
        if sample is case.samples[0]:
            yield pytest.param("cpu", "auto", case, sample, id=f"dry-{p.id}")


def check(case, sample, dtype, device):
    """One call forward and backward against the float64 reference."""
    x = moved(case.inputs(sample, dtype), device)
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
    there = replace(sample, options=moved(sample.options, device))
    ys, grads = run(case.function, case, there, x) if case.differentiable else (case.function(**x, **there.options), {})
    ys = (ys,) if isinstance(ys, Tensor) else ys
    settled(device)
    wanted, wanted_grads = expected(case, sample, dtype)
    cpu = moved(before, "cpu")
    for i, (y, e) in enumerate(zip(ys, wanted, strict=True)):
        assert y.device.type == device and y.dtype == (dtype if e.is_floating_point() else e.dtype)
        assert_close(y.cpu(), e, dtype=dtype, **case.tolerance(sample, cpu), what=f"output {i}")
    assert grads.keys() == wanted_grads.keys()
    for k, e in wanted_grads.items():
        assert grads[k].dtype == dtype
        assert_close(grads[k].cpu(), e, dtype=dtype, **case.tolerance(sample, cpu, backward=True), what=f"gradient of {k}")
    for k, v in before.items():
        assert not isinstance(v, Tensor) or torch.equal(x[k], v), f"{k} was written to"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("device, backend, case, sample", list(plan()))
def test_contract(device, backend, case, sample, dtype):
    with through(backend, device):
        check(case, sample, dtype, device)


def strided(t: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor full of NaN: strides, offset, no alignment."""
    big = torch.full([2 * n + 1 for n in t.shape], True if t.dtype == torch.bool else torch.nan, dtype=t.dtype, device=t.device)
    view = big[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    view.copy_(t)
    return view


def shifted(t: Tensor) -> Tensor:
    """Contiguous, but one element off any alignment."""
    big = torch.full([t.numel() + 2], True if t.dtype == torch.bool else torch.nan, dtype=t.dtype, device=t.device)
    view = big[1:-1].view(t.shape)
    view.copy_(t)
    return view


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [strided, shifted, expanded], ids=lambda f: f.__name__)
@each_operator
def test_layouts(backend, case, layout, device):
    sample = case.samples[0].resized(B=3, N=100, W=20)
    dtype = torch.float16 if layout is shifted else torch.float32
    x = {k: layout(v) if isinstance(v, Tensor) else v for k, v in moved(case.inputs(sample, dtype), device).items()}
    flat = {k: v.clone(memory_format=torch.contiguous_format) if isinstance(v, Tensor) else v for k, v in x.items()}
    with through(backend, device):
        found, wanted = call(case, sample, x), call(case, sample, flat)
    for a, e in zip(found, wanted, strict=True):
        e = e.double() if e.is_floating_point() else e
        assert_close(a.cpu(), e.cpu(), dtype=dtype, **case.tolerance(sample, moved(flat, "cpu"), backward=True), what=layout.__name__)


@pytest.mark.parametrize("sizes", [{"B": 9, "N": 1000, "W": 65}, {"B": 300, "N": 128, "W": 20}], ids=["tiles", "many"])
@each_operator
def test_repeats_bitwise(backend, case, sizes, device):
    assert torch.are_deterministic_algorithms_enabled()
    sample = case.samples[0].resized(**(sizes if device == "cuda" else {"B": 2, "N": 20, "W": 5}))
    x = moved(case.inputs(sample, torch.float32), device)
    with through(backend, device):
        first = call(case, sample, x)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(call(case, sample, x), first, strict=True))


@pytest.mark.parametrize("way", ["block", "once", "tiles"])
@pytest.mark.parametrize("sizes", [{"N": 20}, {"N": 500, "W": 60}, {"B": 300, "N": 900, "W": 64}], ids=["small", "middle", "many"])
def test_every_way_of_a_step(way, sizes, device, monkeypatch):
    """Those that a memory's size does not choose by itself, too; more blocks that wait for each other than a device runs at a time."""
    monkeypatch.setenv("MEMCORE_NTM_STEP", way)
    step = case_of("ntm_step")
    if device != "cuda":
        sizes = {"N": 20}
    with through("native", device):
        check(step, step.samples[0].resized(**sizes), torch.float32, device)


def test_steps_that_wait_in_several_streams(device):
    """Launches whose blocks wait for each other, side by side on one device."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    step = case_of("ntm_step")
    sample = step.samples[0].resized(B=64, N=900, W=64)
    with through("native", device):
        x = moved(step.inputs(sample, torch.float32), device)
        wanted = call(step, sample, x)
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in range(8)], []
        for _ in range(4):
            for s in streams:
                with torch.cuda.stream(s):
                    found.append(call(step, sample, x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for y in found for a, b in zip(y, wanted, strict=True))


@pytest.mark.parametrize("empty", ["B", "N", "W"])
@each_operator
def test_empty(backend, case, empty, device):
    sample = case.samples[0].resized(**{empty: 0})
    with through(backend, device):
        check(case, sample, torch.float32, device)


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_autocast_changes_nothing(case, sample, device):
    x = moved(case.inputs(sample, torch.float32), device)
    plain = case.function(**x, **sample.options)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = case.function(**x, **sample.options)
    for a, e in zip((found,) if isinstance(found, Tensor) else found, (plain,) if isinstance(plain, Tensor) else plain, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@each_operator
def test_second_derivative(backend, case, device):
    """Through the reference, from a first derivative of the kernels."""
    sample = case.samples[0].resized(B=2, N=5, W=3)

    def second(where):
        x = moved(case.inputs(sample, torch.float32), where)
        leaves = [x[k].requires_grad_() for k in case.differentiable if x[k] is not None]
        ys = case.function(**x, **sample.options)
        total = sum(y.square().sum() for y in ((ys,) if isinstance(ys, Tensor) else ys))
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, materialize_grads=True, allow_unused=True)

    with through(backend, device):
        found = second(device)
    for a, e in zip(found, second("cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-3, atol=1e-3 * max(1.0, e.abs().max().item()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_refused_by_kernels_and_right_by_default(backend):
    memory, weights = torch.randn(2, 5, 3, dtype=torch.float64, device="cuda"), torch.rand(2, 1, 5, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(memcore.functional.read(memory, weights), weights @ memory)
    with memcore.backend(backend), pytest.raises(RuntimeError, match="memcore.read: .*float64"):
        memcore.functional.read(memory, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_devices_that_differ_are_told(case):
    if len(case.shapes) < 2:
        return
    sample = case.samples[0]
    x = case.inputs(sample, torch.float32)
    names = [k for k, v in x.items() if isinstance(v, Tensor)]
    x[names[0]] = x[names[0]].cuda()
    with pytest.raises(RuntimeError, match=f"memcore.{case.name}: .*(cpu.*cuda|cuda.*cpu)"):
        case.function(**x, **sample.options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_shapes_are_told_before_a_kernel_runs(backend, device):
    memory = torch.zeros(8, 128, 20, device=device)
    weights, erase, add = (torch.zeros(s, device=device) for s in ((8, 1, 128), (8, 1, 16), (8, 1, 20)))
    words = "memcore.erase_add_write: 'erase' must have shape (B, H, W) = (8, 1, 20) to match 'memory' (8, 128, 20), got (8, 1, 16)"
    with through(backend, device), pytest.raises(ValueError, match=re.escape(words)):
        memcore.functional.erase_add_write(memory, weights, erase, add)
