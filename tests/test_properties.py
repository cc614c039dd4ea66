"""Properties that hold for every size and every number, searched by hypothesis."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import CASES, as_tuple, assert_close, cast
from paths import PATHS, use_path
from memcore import functional as F

# The backend fixture is fixed for all examples of a test, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
same_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

sizes = st.fixed_dictionaries({"B": st.integers(1, 4), "H": st.integers(1, 5), "N": st.integers(1, 70), "W": st.integers(1, 70)})
odd = st.sampled_from([1, 3, 5, 7])
seeds = st.integers(0, 2**31)


def draw(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g) for s in shapes]


def weights(seed, *shape):
    return draw(seed, shape)[0].softmax(-1)


def close(a, e, atol=1e-6):
    torch.testing.assert_close(a, e, rtol=1e-5, atol=atol)


@same_backend
@given(sizes, odd, seeds, st.integers(-100, 100))
def test_shift_commutes_with_roll(backend, s, S, seed, by):
    w, shift = weights(seed, s["B"], s["H"], s["N"]), weights(seed + 1, s["B"], s["H"], S)
    close(F.circular_shift(w.roll(by, -1), shift), F.circular_shift(w, shift).roll(by, -1))


@same_backend
@given(sizes, odd, seeds, st.floats(1, 50), st.floats(-100, 100))
def test_rows_sum_to_one(backend, s, S, seed, gamma, strength):
    B, H, N, W = s.values()
    key, memory = draw(seed, (B, H, W), (B, N, W))
    beta, gate, power = torch.full((B, H), strength), torch.rand(B, H), torch.full((B, H), gamma)
    shift, previous = weights(seed + 1, B, H, S), weights(seed + 2, B, H, N)
    one = torch.ones(B, H)
    close(F.content_addressing(key, memory, beta).sum(-1), one)
    close(F.interpolate(weights(seed, B, H, N), previous, gate).sum(-1), one)
    close(F.circular_shift(previous, shift).sum(-1), one)
    close(F.sharpen(previous, power).sum(-1), one)
    out = F.ntm_addressing(key, memory, beta, gate, shift, power, previous)
    close(out.sum(-1), one)
    assert (out >= 0).all()


@same_backend
@given(sizes, seeds, st.sampled_from(["cosine", "dot"]))
def test_content_addressing_follows_a_permutation_of_the_slots(backend, s, seed, similarity):
    B, H, N, W = s.values()
    key, memory = draw(seed, (B, H, W), (B, N, W))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < 0.8
    w = F.content_addressing(key, memory, similarity=similarity, mask=mask)
    close(F.content_addressing(key, memory[:, order], similarity=similarity, mask=mask[:, order]), w[..., order])


@same_backend
@given(sizes, seeds, st.floats(1e-3, 1e3))
def test_cosine_ignores_the_length_of_the_key(backend, s, seed, factor):
    B, H, N, W = s.values()
    key, memory = draw(seed, (B, H, W), (B, N, W))
    close(F.content_addressing(key * factor, memory), F.content_addressing(key, memory))


@same_backend
@given(sizes, seeds)
def test_writes(backend, s, seed):
    """Zero weights change nothing; the order of the heads does not matter; in place is the same."""
    B, H, N, W = s.values()
    memory, add = draw(seed, (B, N, W), (B, H, W))
    w, erase = weights(seed + 1, B, H, N), draw(seed + 2, (B, H, W))[0].sigmoid()
    assert torch.equal(F.erase_add_write(memory, torch.zeros(B, H, N), erase, add), memory)
    out = F.erase_add_write(memory, w, erase, add)
    order = torch.randperm(H, generator=torch.Generator().manual_seed(seed))
    close(F.erase_add_write(memory, w[:, order], erase[:, order], add[:, order]), out, atol=1e-5)
    assert torch.equal(F.erase_add_write_(memory, w, erase, add), out)


@same_backend
@given(sizes, seeds, st.floats(-3, 3))
def test_read_is_linear(backend, s, seed, c):
    B, H, N, W = s.values()
    m1, m2, w1, w2 = draw(seed, (B, N, W), (B, N, W), (B, H, N), (B, H, N))
    close(F.read(m1 + c * m2, w1), F.read(m1, w1) + c * F.read(m2, w1), atol=1e-4)
    close(F.read(m1, w1 + c * w2), F.read(m1, w1) + c * F.read(m1, w2), atol=1e-4)


@same_backend
@given(sizes, seeds, st.floats(1, 100))
def test_sharpening_keeps_the_order_of_slots(backend, s, seed, gamma):
    w = weights(seed, s["B"], s["H"], s["N"])
    out = F.sharpen(w, torch.full((s["B"], s["H"]), gamma))
    close(out.gather(-1, w.argmax(-1, keepdim=True)), out.amax(-1, keepdim=True))
    assert (out.max(-1).values >= w.max(-1).values - 1e-5).all()


@same_backend
@given(st.integers(1, 4), st.integers(1, 90), st.integers(0, 99), seeds, st.integers(1, 9))
def test_least_used_is_sorted(backend, B, N, n, seed, levels):
    g = torch.Generator().manual_seed(seed)
    usage = torch.randint(levels, (B, N), generator=g).float()
    found = F.least_used(usage, n)
    pairs = [[(usage[b, i].item(), i) for i in row] for b, row in enumerate(found.tolist())]
    assert pairs == [sorted(zip(row, range(N)))[:n] for row in usage.tolist()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@settings(max_examples=6)
@given(s=sizes, extra=st.fixed_dictionaries({"S": odd, "shared": st.integers(0, 1), "masked": st.integers(0, 1)}))
def test_any_shape_against_the_reference(path, case, s, extra):
    sample = case.samples[0].resized(**s, **extra)
    x = case.inputs(sample, torch.float32)
    with use_path(path):
        ys = as_tuple(case.function(**x, **sample.options))
    wanted = as_tuple(case.reference(**{k: cast(v, torch.float64) for k, v in x.items()}, **sample.options))
    for y, e in zip(ys, wanted, strict=True):
        assert_close(y, e, dtype=torch.float32, **case.tolerance(sample, x), what=f"{sample.sizes}")
