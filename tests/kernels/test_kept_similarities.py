"""What forwards on the CPU keep of the addressing for their backwards (csrc/cpu/kept.h): when, how much, and that it changes nothing."""

import itertools

import pytest
import torch

import memcore
from cases import CASES, as_tuple, assert_close
from contract import DIFFERENTIABLE, bound, cotangents, each_dtype, expected, run, track
from memcore.bench import measure
from memcore.kernels import _op
from memcore.kernels._op import KEPT_FROM, keeps, similar_numbers
from paths import PATHS, use_path
from test_contract_dispatch import ALL_CHECKS, leaf, raw_calls

NATIVE = [p for p in PATHS if p.startswith("native")]
OPERATORS = ("content_addressing", "ntm_addressing", "ntm_step")
SECOND_CACHE = 256 << 10  # bytes of a memory from which on passes go back and forth (kAhead)
SAMPLES = [p for p in DIFFERENTIABLE if p.values[0].name in OPERATORS]
FIRSTS = [next(p for p in SAMPLES if p.values[0].name == name) for name in OPERATORS]


def keep(monkeypatch, always: bool) -> None:
    """Whatever the sizes are, except for a memory that the batch shares."""
    monkeypatch.setattr(_op, "keeps", lambda memory, *_: always and memory.dim() == 3 and torch.is_grad_enabled())


def names(calls) -> list[str]:
    return [op._schema.name.removeprefix("memcore::") for op, _ in calls]


@pytest.mark.parametrize("path", NATIVE)
@each_dtype
@pytest.mark.parametrize("case, sample", SAMPLES)
def test_same_bits(case, sample, dtype, path, monkeypatch):
    found = []
    for always in (False, True):
        keep(monkeypatch, always)
        with use_path(path):
            found.append(run(case.function, case, sample, case.inputs(sample, dtype)))
    (plain, gradients), (ys, grads) = found
    memory = case.inputs(sample, dtype)["memory"]
    rtol = 1e-12 if dtype == torch.float64 and memory[0].nbytes > SECOND_CACHE else 0  # other orders of passes and so of sums
    for a, b in zip((*as_tuple(plain), *gradients.values()), (*as_tuple(ys), *grads.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("case, sample", FIRSTS)
def test_a_memory_beyond_the_second_cache(case, sample, path, monkeypatch):
    """Its passes go back and forth, in another order if the first is not needed."""
    keep(monkeypatch, True)
    sample = sample.resized(B=2, N=4000, W=20)
    x = case.inputs(sample, torch.float32)
    assert x["memory"][0].nbytes > SECOND_CACHE
    with use_path(path):
        _, grads = run(case.function, case, sample, x)
    for k, e in expected(case, sample, torch.float32)[1].items():
        assert_close(grads[k], e, dtype=torch.float32, **case.tolerance(sample, x, backward=True), what=f"gradient of {k}")


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_registration(case, sample, operators, monkeypatch):
    keep(monkeypatch, True)
    calls = raw_calls(case, sample, torch.float32)
    assert names(calls) == [f"{case.name}_kept_fwd", f"{case.name}_kept_bwd"]
    for (op, args), tracked in zip(calls, (True, False), strict=True):
        torch.library.opcheck(op, tuple(leaf(v, tracked) for v in args), test_utils=ALL_CHECKS)


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_derivatives_of_any_order(case, sample, operators, monkeypatch):
    keep(monkeypatch, True)
    f, leaves = bound(case, sample.resized(B=1, N=3, W=2), case.inputs(sample.resized(B=1, N=3, W=2)))
    assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_compiles(case, sample, operators, monkeypatch):
    keep(monkeypatch, True)
    _, wanted = run(case.function, case, sample, case.inputs(sample, torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(case.function, backend="aot_eager", fullgraph=True)
    _, grads = run(compiled, case, sample, case.inputs(sample, torch.float32))
    for k, g in grads.items():
        torch.testing.assert_close(g, wanted[k], rtol=0, atol=0)


@pytest.mark.parametrize("path", NATIVE)
def test_wrong_sizes_are_refused(path):
    key, memory = torch.randn(2, 1, 8), torch.randn(2, 5, 8)
    with use_path(path):
        weights, kept = torch.ops.memcore.content_addressing_kept_fwd(key, memory, None, None, True)
        for wrong in (kept[:-1], kept.double(), torch.cat([kept, kept])[::2]):
            with pytest.raises(RuntimeError, match="what the forward kept has another size or type"):
                torch.ops.memcore.content_addressing_kept_bwd(weights, wrong, key, memory, None, None, True)
        with pytest.raises(RuntimeError, match="wants a memory for each element"):
            torch.ops.memcore.content_addressing_kept_fwd(key, memory[0], None, None, True)


def test_when():
    H, W = 3, 36  # four numbers a slot are a ninth of 36
    memory = torch.empty(4, KEPT_FROM // (4 * W) + 1, W, requires_grad=True)
    assert keeps(memory, H) and keeps(memory.detach(), H, None, torch.empty(1, requires_grad=True))
    assert not keeps(memory, H + 1)
    assert not keeps(memory.bfloat16(), H)  # float32 numbers are twice as large
    assert not keeps(memory[:, 8:], H) and not keeps(memory[0], H)
    assert not keeps(memory.detach(), H, None) and not keeps(memory.to("meta"), H)
    with torch.no_grad():
        assert not keeps(memory, H)
    for N in (1, 8, 17):  # rows are padded to 16 slots
        assert not keeps(torch.empty(KEPT_FROM // N, N, W, requires_grad=True), H)
    for N, H, W in ((512, 4, 64), (20, 1, 32), (128, 1, 20)):
        memory = torch.empty(KEPT_FROM // N, N, W, requires_grad=True)
        assert keeps(memory, H) == (8 * similar_numbers(H, N) <= N * W)


@pytest.mark.parametrize("size", ["B", "N"])
def test_exported_programs_take_any_size(size, operators):
    """Beyond and below what decides elsewhere, and on any device."""

    class Addressing(torch.nn.Module):
        def forward(self, key, memory):
            return memcore.functional.content_addressing(key, memory)

    def inputs(B=4, N=600):
        return torch.randn(B, 1, 64, requires_grad=True), torch.randn(B, N, 64, requires_grad=True)

    dim = torch.export.Dim(size, min=2, max=5000)
    shapes = ({0: dim}, {0: dim}) if size == "B" else (None, {1: dim})
    program = torch.export.export(Addressing(), inputs(), dynamic_shapes=shapes)
    assert "kept" not in str(program.graph)
    for n in (2, 3000):
        x = inputs(**{size: n})
        torch.testing.assert_close(program.module()(*x), memcore.functional.content_addressing(*x), rtol=0, atol=0)


@pytest.mark.parametrize("case, sample", FIRSTS)
def test_backward_by_another_instruction_set(case, sample, monkeypatch):
    """It computes again what it cannot read."""
    keep(monkeypatch, True)
    sample = sample.resized(B=2, N=67, W=9)
    x = case.inputs(sample, torch.float32)
    wanted = expected(case, sample, torch.float32)[1]
    for first, second in itertools.permutations(NATIVE, 2):
        leaves = track(case, x)
        with use_path(first):
            ys = as_tuple(case.function(**x, **sample.options))
        with use_path(second):
            grads = torch.autograd.grad(ys, leaves, cotangents(ys), retain_graph=True)
        for g, e in zip(grads, wanted.values(), strict=True):
            assert_close(g, e, dtype=torch.float32, **case.tolerance(sample, x, backward=True), what=f"{first}, then {second}")


@pytest.mark.skipif(not NATIVE, reason="needs the native library")
def test_at_most_an_eighth_of_a_memory_more():
    """The bar is 1.2 memories a step, the memory itself included."""
    case = next(c for c in CASES if c.name == "ntm_step")
    sample = next(s for s in case.samples if s.id == "small").resized(B=2, N=2048, W=64)
    x = case.inputs(sample, torch.float32)
    x["memory"].requires_grad_()
    with use_path(NATIVE[-1]):
        kept = measure.saved_bytes(lambda: case.function(**x, **sample.options).reads, [x["interface"]])
    memory = x["memory"].nbytes
    assert memory * 1.01 < kept <= 1.2 * memory
