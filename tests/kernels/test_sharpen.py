"""Sharpening: literal values, zeros, residue, extreme powers, NaN."""

import math

import pytest
import torch

from memcore.functional import sharpen

pytestmark = pytest.mark.usefixtures("backend")


def test_by_hand():
    w = sharpen(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[2.0]]))
    torch.testing.assert_close(w, torch.tensor([[[1 / 14, 4 / 14, 9 / 14]]]))


def test_gamma_below_1_and_negative_follow_the_formula():
    w = sharpen(torch.tensor([[[1.0, 4.0], [1.0, 4.0], [1.0, 4.0]]]), torch.tensor([[0.5, 0.0, -1.0]]))
    torch.testing.assert_close(w, torch.tensor([[[1 / 3, 2 / 3], [0.5, 0.5], [0.8, 0.2]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_and_residue(dtype):
    """0 and a negative rounding residue stay exactly 0 with gradient 0; the rest is as if they were absent."""
    w = torch.tensor([[[0.5, 0.0, 0.25, -1e-7, -0.0]]]).to(dtype).requires_grad_()
    gamma = torch.full((1, 1), 2.0, dtype=dtype, requires_grad=True)
    out = sharpen(w, gamma)
    torch.testing.assert_close(out, torch.tensor([[[0.8, 0, 0.2, 0, 0]]]).to(dtype))
    assert not out[0, 0, [1, 3, 4]].any()
    (out * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).to(dtype)).sum().backward()
    assert not w.grad[0, 0, [1, 3, 4]].any()
    # d out_0 / d w_0 = gamma out_0 (1 - out_0) / w_0, and gamma's gradient is the covariance with log w
    wanted = torch.tensor([2 * 0.8 * (1 - 1.4) / 0.5, 2 * 0.2 * (3 - 1.4) / 0.25])
    rtol = max(1e-5, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(w.grad[0, 0, [0, 2]].float(), wanted, rtol=rtol, atol=0)
    slope = 0.8 * (1 - 1.4) * math.log(0.5) + 0.2 * (3 - 1.4) * math.log(0.25)
    torch.testing.assert_close(gamma.grad.float(), torch.tensor([[slope]]), rtol=rtol, atol=0)


def test_all_zero_row():
    w = torch.zeros(2, 2, 5)
    w[1] = 0.2
    w.requires_grad_()
    gamma = torch.full((2, 2), 3.0, requires_grad=True)
    out = sharpen(w, gamma)
    assert not out[0].any()
    torch.testing.assert_close(out[1], torch.full((2, 5), 0.2))
    for g in torch.autograd.grad(out[..., 0].sum(), (w, gamma)):
        assert not g[0].any() and g.isfinite().all()


@pytest.mark.parametrize("gamma", [1.0, 2.5, 20.0, 100.0])
@pytest.mark.parametrize("N", [1, 7, 1024, 100_000])
def test_mass_is_never_lost(gamma, N):
    """Also where the naive power underflows: N = 1024 with gamma 20 sums to 0 in float32."""
    w = torch.full((1, 2, N), 1 / N)
    w[0, 1] = torch.rand(N).softmax(-1)
    out = sharpen(w, torch.full((1, 2), gamma))
    assert (out.double().sum(-1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(out[0, 0], w[0, 0])


def test_gamma_1_normalises():
    w = torch.rand(2, 3, 63) * 5
    torch.testing.assert_close(sharpen(w, torch.ones(2, 3)), w / w.sum(-1, keepdim=True))


def test_huge_gamma_is_argmax_with_shared_ties():
    w = torch.tensor([[[0.2, 0.3, 0.3, 0.2]]])
    assert sharpen(w, torch.full((1, 1), 1e30)).tolist() == [[[0, 0.5, 0.5, 0]]]


@pytest.mark.parametrize("N", [1, 5, 63])
def test_nan_spreads_over_its_row_only(N):
    w, gamma = torch.rand(1, 4, N) + 0.1, torch.full((1, 4), 2.0)
    w[0, 1, N // 2] = math.nan
    gamma[0, 2] = math.nan
    w[0, 3], gamma[0, 3] = 0, math.nan
    out = sharpen(w, gamma)
    assert out[0, 0].isfinite().all() and out[0, 1:].isnan().all()


def test_nan_beside_zeros():
    out = sharpen(torch.tensor([[[0.0, math.nan, 0.0, 0.5]]]), torch.ones(1, 1))
    assert out.isnan().all()
