"""The recurrence's persistent kernel, its CUDA source run on the CPU: against float64 in several orders of threads and blocks, in its three
forms (memories in shared memory; in a workspace, each brought to shared memory; read in the workspace), and under the sanitizers."""

import os
import subprocess

import cuda_shim
import pytest
import shim_build
import shim_calls
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcore import _backend
from memcore import backend as choose
from memcore.kernels.ntm_sequence import cuda
from memcore.kernels.ntm_sequence.op import _sizes
from shim_calls import SEQUENCES as CASES
from test_ntm_sequence import call, compare, draw, gradients, ntm_sequence

SOME = ("lengths_two_layers", "five_reads_two_writes", "tanh", "clipped")
"""Every branch of the kernel's own between them."""


def sizes_of(drawn) -> cuda.Sizes:
    tensors, flat, options = drawn
    layers = (len(flat) - 4) // 2
    heads = options["read_heads"], options["write_heads"], options["shift_range"]
    X, K = tensors["input"].shape[2], tensors["controller"].shape[2]
    return cuda.Sizes(X, K, len(flat[-1]), *tensors["memory"].shape[1:], options["lstm"], layers, *heads)


def launches(drawn):
    with cuda_shim.recorded() as found:
        gradients(ntm_sequence, *drawn)
    return found


def limits(drawn) -> tuple[int, int, int]:
    """Shared memory of a block that leaves the backward each of its forms."""
    M = drawn[0]["memory"][0].numel()
    least = cuda.shared_bytes(sizes_of(drawn))[1]
    return cuda_shim.LIMIT, least + (4 * (M + 4) + 15) // 16 * 16, least


FORMS = ("shared", "staged", "in_place")


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, backend):
    compare(draw(**CASES[name]))


@pytest.mark.parametrize("order, form", [("reverse", "shared"), ("random:1", "staged"), ("random:1", "in_place")])
@pytest.mark.parametrize("name", SOME)
def test_orders_and_forms(name, order, form, backend):
    drawn = draw(**CASES[name])
    with cuda_shim.schedule(order), cuda_shim.shared_limit(limits(drawn)[FORMS.index(form)]):
        compare(drawn)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    n = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    T, B, R = n(1, 7), n(1, 3), n(0, 8)
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    drawn = draw(
        n(0, 1 << 30), T=T, B=B, N=n(1, 70), W=n(1, 40), K=n(1, 300), X=n(0, 5), O=n(0, 5), R=R, Hw=n(0 if R else 1, 3), S=n(0, 2), layers=n(1, 3),
        lstm=data.draw(st.booleans()), order=data.draw(st.sampled_from(["write_read", "read_write"])), lengths=lengths,
        checkpoint_every=data.draw(st.none() | st.integers(1, 8)), clip=data.draw(st.none() | st.floats(0.1, 3)),
    )  # fmt: skip
    with cuda_shim.use():
        for limit in limits(drawn):
            if limit >= cuda.shared_bytes(sizes_of(drawn))[0]:
                with cuda_shim.shared_limit(limit):
                    compare(drawn, tolerance=1e-3, any_draw=True)


def test_the_same_bits(backend):
    """In every order, with and without what a backward needs, whatever the steps between two copies."""
    drawn = draw(**CASES["lengths_two_layers"])
    ys, grads = gradients(ntm_sequence, *drawn)
    for order in ("forward", "random:2"):
        for every in (1, 2, 50):
            with cuda_shim.schedule(order):
                again = gradients(ntm_sequence, *drawn[:2], {**drawn[2], "checkpoint_every": every})
            assert all(torch.equal(a, b) for a, b in zip((*ys, *grads), (*again[0], *again[1]), strict=True))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(ys, call(ntm_sequence, *drawn), strict=True))


@pytest.mark.parametrize("only", range(5))
def test_one_gradient_alone(only, backend):
    compare(draw(lengths=[5, 2, 3]), only=only)


def test_padding_is_not_looked_at(backend):
    tensors, flat, options = draw(lengths=[5, 0, 3])
    spoilt = {**tensors, "input": tensors["input"].clone()}
    spoilt["input"][:, 1], spoilt["input"][3:, 2] = float("nan"), float("nan")
    (ys, grads), (zs, spoilt_grads) = gradients(ntm_sequence, tensors, flat, options), gradients(ntm_sequence, spoilt, flat, options)
    assert all(torch.equal(a, b) for a, b in zip((*ys, *grads), (*zs, *spoilt_grads), strict=True))


@pytest.mark.parametrize("sizes", [{"T": 0}, {"B": 0}, {"X": 0, "R": 0, "lstm": False}, {"O": 0}], ids=str)
def test_nothing_there(sizes, backend):
    drawn = draw(**sizes)
    ys, grads = gradients(ntm_sequence, *drawn)
    with choose("reference"):
        wanted, wanted_grads = gradients(ntm_sequence, *drawn)
    for a, b in zip((*ys, *grads), (*wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype, backend):
    tensors, flat, options = draw(dtype=dtype)
    ys, grads = gradients(ntm_sequence, tensors, flat, options)
    wide = gradients(ntm_sequence, {k: v.float() for k, v in tensors.items()}, [t.float() for t in flat], options)
    for a, b in zip((*ys, *grads), (*wide[0], *wide[1]), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.03 * max(1.0, b.abs().max().item()))


# Where it runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ordinary", "tanh", "three_tanh_layers", "two_layers", "five_reads_two_writes", "only_writes", "groups"])
def test_sizes_are_those_of_the_launches(name, backend):
    drawn = draw(**CASES[name])
    forward, backward = cuda.shared_bytes(sizes_of(drawn))
    with cuda_shim.shared_limit(max(forward, backward)):
        found = launches(drawn)
    assert [(k.blocks, k.threads) for k in found] == [(len(drawn[0]["memory"]), 256)] * 2
    assert found[0].shared == forward
    with cuda_shim.shared_limit(backward):
        assert backward < forward or launches(drawn)[1].shared == backward
    with cuda_shim.shared_limit(forward - 1), pytest.raises(RuntimeError, match="does not fit the shared memory of a block"):
        call(ntm_sequence, *drawn)
    tensors, flat, options = drawn
    parameters, numbers = torch.cat([t.reshape(-1) for t in flat]), tuple(sizes_of(drawn))
    out = torch.ops.memcore._ntm_sequence_fwd_cuda(
        *tensors.values(), parameters, None, numbers[2], *numbers[5:7], *numbers[7:], True, 0.0, 3, True
    )  # fmt: skip
    T, B = tensors["input"].shape[:2]
    assert out[5].numel() == sum(cuda.saved_numbers(sizes_of(drawn), T, B, 3).values())


def test_parameters_lie_as_in_the_operator():
    s = cuda.Sizes(3, 6, 4, 7, 5, True, 2, 2, 1, 1)
    shapes = _sizes(s.inputs, s.units, s.outputs, s.width, s.lstm, s.layers, s.read_heads, s.write_heads, s.shift_range)
    assert [s.layer(i) for i in range(2)] == [shape[0] for shape in shapes[:4:2]] and shapes[4] == (s.interface, s.units)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A build with CUDA kernels on a card of 99 KiB a block."""
    monkeypatch.setattr(_backend, "_missing", {"native": "", "triton": ""})
    monkeypatch.setattr(_backend, "_native_gpu", frozenset(cuda_shim.operators()))
    monkeypatch.setattr(_backend, "_unusable", {})
    monkeypatch.setattr(cuda, "limit", lambda device: 99 << 10)


COPY = cuda.Sizes(inputs=9, units=100, outputs=8, slots=128, width=20, lstm=True, layers=1, read_heads=1, write_heads=1, shift_range=1)


@pytest.mark.parametrize(
    "sizes, grad, dtype, backend, takes",
    [
        ({}, True, torch.float32, "auto", True),
        ({}, True, torch.bfloat16, "native", True),
        ({}, True, torch.float64, "auto", False),
        ({}, True, torch.float32, "triton", False),
        ({}, True, torch.float32, "reference", False),
        ({"slots": 512}, True, torch.float32, "auto", True),
        ({"slots": 700}, True, torch.float32, "auto", False),  # the gradient's arrays find no room
        ({"slots": 700}, False, torch.float32, "auto", True),
        ({"slots": 2000}, False, torch.float32, "auto", False),
        ({"read_heads": 8}, True, torch.float32, "auto", True),
        ({"read_heads": 9}, True, torch.float32, "auto", False),
    ],
)
def test_where_it_runs(sizes, grad, dtype, backend, takes, on_a_gpu):
    s = COPY._replace(**sizes)
    memory = torch.empty(2, s.slots, s.width, dtype=dtype, device="meta")
    with torch.set_grad_enabled(grad), choose(backend):
        assert cuda.fits(memory, s) is takes


def test_a_build_without_the_kernel_or_a_card_that_refuses_it(on_a_gpu, monkeypatch):
    memory = torch.empty(2, 128, 20, device="meta")
    monkeypatch.setattr(_backend, "_unusable", {("native", 0): "no kernel image"})
    assert not cuda.fits(memory, COPY)
    monkeypatch.setattr(_backend, "_unusable", {})
    monkeypatch.setattr(_backend, "_native_gpu", frozenset({"ntm_step"}))
    assert not cuda.fits(memory, COPY)


def test_one_look_decides(monkeypatch):
    """The operator asks `fits` for a GPU's tensors, and runs step by step where they do not."""
    asked = []
    fake = torch._subclasses.FakeTensorMode()
    monkeypatch.setattr(cuda, "fits", lambda memory, sizes: asked.append(sizes) is not None)
    with fake:
        tensors, flat, options = draw(T=2, R=2)
        on = {k: torch.empty(v.shape, device="cuda") for k, v in tensors.items()}
        ys = call(ntm_sequence, on, [torch.empty(t.shape, device="cuda") for t in flat], options)
    assert asked == [sizes_of((tensors, flat, options))] and ys.output.shape == (2, 3, 4)


def test_more_read_heads_are_refused(backend):
    with pytest.raises(RuntimeError, match="takes up to 8 read heads, got 9"):
        call(ntm_sequence, *draw(R=9))
    compare(draw(R=8))


# Sanitizers -----------------------------------------------------------------------------------------------------------


MUTATED = ("small_lengths", "small_heads", "wide_controller", "many_inputs")
"""What mutants of the kernel are tried on."""


def recorded(names):
    """Calls of these cases in each form of the kernel."""
    for name in names:
        drawn = draw(**CASES[name])
        for limit in dict.fromkeys(limits(drawn)):
            if limit >= cuda.shared_bytes(sizes_of(drawn))[0]:
                yield from shim_calls.sequence_calls(name, limit)


def check(names, sanitizer, order, tmp_path):
    shim_calls.write(tmp_path / "calls", recorded(names))
    done = subprocess.run(
        [str(shim_build.driver(sanitizer)), str(tmp_path / "calls")], capture_output=True, text=True, timeout=3000,
        env={**os.environ, **shim_build.ENVIRONMENT, "MC_SHIM_SCHED": order},
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_sanitizer(tmp_path):
    """Of threads, whose build takes as long again, when slow tests run."""
    check(("lengths_two_layers", "five_reads_two_writes"), "address", "forward", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer, order", [("address", "forward"), ("address", "random:1"), ("thread", "forward")])
def test_sanitizer_on_every_case(sanitizer, order, tmp_path):
    check(CASES, sanitizer, order, tmp_path)
