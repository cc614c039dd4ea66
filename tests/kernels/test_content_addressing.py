"""Content addressing: literal values, PyTorch's cosine similarity, the edges of norm, strength and mask."""

import math

import pytest
import torch

from memcore.functional import content_addressing

pytestmark = pytest.mark.usefixtures("backend")
NAN = math.nan


def test_by_hand():
    """Cosines 1, 0 and -1 at strength ln 2: weights 2 : 1 : 1/2."""
    key = torch.tensor([[[3.0, 4.0]]])
    memory = torch.tensor([[[6.0, 8.0], [-4.0, 3.0], [-0.3, -0.4]]])
    w = content_addressing(key, memory, torch.tensor([[math.log(2)]]))
    torch.testing.assert_close(w, torch.tensor([[[4 / 7, 2 / 7, 1 / 7]]]))


def test_dot_by_hand():
    """Dot products 0, ln 3, with strength None = 1: weights 1 : 3."""
    memory = torch.tensor([[[0.0, 5.0], [math.log(3), 0.0]]])
    w = content_addressing(torch.tensor([[[1.0, 0.0]]]), memory, similarity="dot")
    torch.testing.assert_close(w, torch.tensor([[[0.25, 0.75]]]))


@pytest.mark.parametrize("W", [1, 3, 20, 100])
def test_cosine_is_torchs(W):
    key, memory = torch.randn(2, 3, W, dtype=torch.float64), torch.randn(2, 9, W, dtype=torch.float64)
    similarity = torch.nn.functional.cosine_similarity(key[:, :, None], memory[:, None], dim=-1)
    torch.testing.assert_close(content_addressing(key, memory, torch.full((2, 3), 2.5).double()), (2.5 * similarity).softmax(-1))


def test_cosine_of_tiny_norms_is_torchs():
    """Norms from 1e-12 to 1, each clamped to 1e-8 by itself."""
    key = torch.tensor([[[3e-10, 4e-10], [3e-5, 4e-5], [3.0, 4.0]]], dtype=torch.float64)
    memory = torch.tensor([[[1e-12, 0.0], [0.0, 2e-9], [1e-8, 1e-8], [1e-3, 0.0]]], dtype=torch.float64)
    similarity = torch.nn.functional.cosine_similarity(key[:, :, None], memory[:, None], dim=-1)
    torch.testing.assert_close(content_addressing(key, memory, torch.full((1, 3), 3.0).double()), (3 * similarity).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_key_and_zero_row(dtype):
    """Similarity exactly 0 and gradient exactly 0 there; the other rows keep theirs."""
    key = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=dtype, requires_grad=True)
    memory = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]], dtype=dtype, requires_grad=True)
    w = content_addressing(key, memory)
    third = torch.full((3,), 1 / 3, dtype=dtype)
    e = math.e
    torch.testing.assert_close(w[0], torch.stack([third, torch.tensor([e, 1, 1], dtype=dtype) / (e + 2)]))
    assert w[0, 1, 1] == w[0, 1, 2], "a zero row and an orthogonal one have the same similarity, 0"
    dk, dm = torch.autograd.grad((w * torch.tensor([1.0, -2.0, 3.0], dtype=dtype)).sum(), (key, memory))
    assert not dk[0, 0].any() and not dm[0, 1].any()
    assert dk[0, 1].any() and dm[0, 2].any()


@pytest.mark.parametrize("dtype, tiny", [(torch.float32, 1e-30), (torch.float64, 1e-200)])
def test_norm_underflow_counts_as_zero(dtype, tiny):
    key = torch.full((1, 1, 4), tiny, dtype=dtype, requires_grad=True)
    memory = torch.randn(1, 3, 4, dtype=dtype)
    w = content_addressing(key, memory, torch.full((1, 1), 1e6, dtype=dtype))
    torch.testing.assert_close(w, torch.full((1, 1, 3), 1 / 3, dtype=dtype))
    w[0, 0, 0].backward()
    assert not key.grad.any()


@pytest.mark.parametrize("norm", [1e-15, 1e-12, 1e-9, 9e-9])
def test_gradient_below_eps_is_bounded(norm):
    """One unit of gradient on the score, at most 1/eps on the key."""
    key = torch.tensor([[[norm, 0.0]]], dtype=torch.float64, requires_grad=True)
    memory = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    w = content_addressing(key, memory)
    dk, dm = torch.autograd.grad(w[0, 0, 0], (key, memory))
    assert 0 < dk.abs().max() <= 1e8 and dm.abs().max() <= 1
    # d w_0 = w_0 w_1 (d s_0 - d s_1) with s = key . row / eps
    share = (w[0, 0, 0] * w[0, 0, 1]).item()
    torch.testing.assert_close(dk, torch.tensor([[[share * 1e8, -share * 1e8]]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("W", [3, 7, 20, 64, 100])
def test_huge_strength_shares_among_identical_rows(dtype, similarity, W):
    """Wherever identical rows stand, vector remainders included, they tie bit for bit."""
    memory = torch.randn(2, 63, W).to(dtype)
    memory[:, [0, 5, 31, 62]] = 3 * memory[:, :1].abs() + 1
    key = memory[:, :1].clone()
    w = content_addressing(key, memory, torch.full((2, 1), 1e30, dtype=dtype), similarity=similarity)
    winners = (memory == key).all(-1)
    torch.testing.assert_close(w[:, 0], winners.to(dtype) / winners.sum(-1, keepdim=True).to(dtype))


def test_strength_0_negative_and_nan():
    key, memory = torch.randn(1, 3, 5), torch.randn(1, 8, 5)
    w = content_addressing(key, memory, torch.tensor([[0.0, -1e30, NAN]]))
    torch.testing.assert_close(w[0, 0], torch.full((8,), 1 / 8))
    similarity = torch.nn.functional.cosine_similarity(key[0, 1], memory[0], dim=-1)
    assert torch.equal(w[0, 1], torch.nn.functional.one_hot(similarity.argmin(), 8).float())
    assert w[0, 2].isnan().all()


@pytest.mark.parametrize("strength", [-40.0, 40.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e15])
def test_scores_never_overflow(strength, scale):
    w = content_addressing(torch.randn(1, 2, 8) * scale, torch.randn(1, 50, 8) * scale, torch.full((1, 2), strength))
    torch.testing.assert_close(w.sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_masked_slots_may_hold_anything(similarity):
    """NaN and Inf behind the mask: weight 0, the others as if those slots were absent, gradients 0 there."""
    memory = torch.randn(2, 6, 3)
    memory[:, 1], memory[:, 4] = NAN, math.inf
    mask = torch.tensor([True, False, True, True, False, True]).expand(2, 6)
    key, strength = torch.randn(2, 2, 3).requires_grad_(), torch.rand(2, 2).requires_grad_()
    memory.requires_grad_()
    w = content_addressing(key, memory, strength, mask=mask, similarity=similarity)
    kept = [0, 2, 3, 5]
    without = content_addressing(key, memory[:, kept], strength, similarity=similarity)
    torch.testing.assert_close(w[:, :, kept], without)
    assert not w[:, :, [1, 4]].any()
    c = torch.randn(2, 2, 6)
    found = torch.autograd.grad((w * c).sum(), (key, memory, strength), retain_graph=True)
    wanted = torch.autograd.grad((without * c[:, :, kept]).sum(), (key, memory, strength))
    for a, e in zip(found, wanted):
        torch.testing.assert_close(a, e)
    assert not found[1][:, [1, 4]].any()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_everything_masked(similarity):
    """Zeros and zero gradients whatever key, strength and memory hold, in one batch item beside an ordinary one."""
    key = torch.stack([torch.full((2, 3), NAN), torch.randn(2, 3)]).requires_grad_()
    memory = torch.stack([torch.full((4, 3), NAN), torch.randn(4, 3)]).requires_grad_()
    strength = torch.tensor([[math.inf, NAN], [1.0, 2.0]], requires_grad=True)
    mask = torch.tensor([[False] * 4, [True] * 4])
    w = content_addressing(key, memory, strength, mask=mask, similarity=similarity)
    assert not w[0].any()
    torch.testing.assert_close(w[1].sum(-1), torch.ones(2))
    for g in torch.autograd.grad((w * torch.randn(2, 2, 4)).sum(), (key, memory, strength)):
        assert not g[0].any() and g[1].any() and g.isfinite().all()


def test_no_slots():
    key = torch.randn(2, 3, 4, requires_grad=True)
    w = content_addressing(key, torch.zeros(2, 0, 4), torch.full((2, 3), NAN))
    assert w.shape == (2, 3, 0)
    w.sum().backward()
    assert torch.equal(key.grad, torch.zeros_like(key))


def test_shared_memory_is_the_same_for_all():
    key, memory = torch.randn(3, 2, 5), torch.randn(7, 5)
    torch.testing.assert_close(content_addressing(key, memory), content_addressing(key, memory.expand(3, 7, 5)), rtol=0, atol=0)


def test_bad_input():
    key, memory = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"memcore.content_addressing: 'similarity' must be 'cosine' or 'dot', got 'l2'"):
        content_addressing(key, memory, similarity="l2")
    with pytest.raises(ValueError, match=r"'memory' must have shape \(B, N, W\) = \(2, 5, 4\) to match 'key' \(2, 3, 4\), got \(1, 5, 4\)"):
        content_addressing(key, memory[:1])
    with pytest.raises(ValueError, match=r"'mask' must have shape \(B, N\) = \(2, 5\) to match 'memory' .*, got \(5,\)"):
        content_addressing(key, memory, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"memcore.content_addressing: 'mask' must be a bool tensor, got torch.float32"):
        content_addressing(key, memory, mask=torch.ones(2, 5))
