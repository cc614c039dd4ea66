"""The NTM's addressing: the four functions in order, by hand and at the edges."""

import math

import pytest
import torch

from memcore import functional as F

pytestmark = pytest.mark.usefixtures("backend")


def compose(key, memory, strength, gate, shift, gamma, previous):
    content = F.content_addressing(key, memory, strength)
    return F.sharpen(F.circular_shift(F.interpolate(content, previous, gate), shift), gamma)


def arguments(B=2, H=3, N=20, W=7, S=3, dtype=torch.float64):
    shift, previous = torch.randn(B, H, S).softmax(-1), torch.randn(B, H, N).softmax(-1)
    args = torch.randn(B, H, W), torch.randn(B, N, W), torch.rand(B, H) * 5, torch.rand(B, H), shift, 1 + torch.rand(B, H) * 3, previous
    return [t.to(dtype) for t in args]


def test_by_hand():
    """Content 2/3, 1/3, 0..., gated with a focus on the last slot, moved one on, squared."""
    key, memory = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    previous = torch.tensor([[[0.0, 1.0]]])
    out = F.ntm_addressing(
        key, memory, torch.tensor([[math.log(2)]]), torch.tensor([[0.5]]), torch.tensor([[[0.0, 0.0, 1.0]]]), torch.tensor([[2.0]]), previous
    )
    torch.testing.assert_close(out, torch.tensor([[[4 / 5, 1 / 5]]]))  # (1/3, 2/3) shifted is (2/3, 1/3); squares 4 : 1


@pytest.mark.parametrize("sizes", [{}, {"N": 1, "W": 1, "S": 5}, {"N": 3, "S": 7}, {"N": 100, "W": 63, "H": 1}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_composition(sizes, dtype):
    args = [t.requires_grad_() for t in arguments(**sizes, dtype=dtype)]
    out, wanted = F.ntm_addressing(*args), compose(*args)
    torch.testing.assert_close(out, wanted)
    c = torch.randn_like(out)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    for a, e in zip(torch.autograd.grad((out * c).sum(), args), torch.autograd.grad((wanted * c).sum(), args)):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("gamma", [1.0, 20.0, 100.0])
def test_a_gate_of_0_with_a_one_hot_shift_rolls(gamma):
    args = arguments(dtype=torch.float32)
    args[3][:] = 0
    args[4][:] = torch.tensor([0.0, 0.0, 1.0])
    args[5][:] = gamma
    args[6][:] = torch.nn.functional.one_hot(torch.tensor(19), 20)
    assert torch.equal(F.ntm_addressing(*args), args[6].roll(1, -1))


def test_zero_key_and_rows_are_harmless():
    args = arguments()
    args[0][0] = 0
    args[1][:, ::3] = 0
    for t in args:
        t.requires_grad_()
    out = F.ntm_addressing(*args)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3).double())
    grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), args)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0].any() and not grads[1][:, ::3].any()


@pytest.mark.parametrize("strength", [0.0, 1e4, 1e30, -1e30])
def test_any_strength(strength):
    args = arguments(dtype=torch.float32)
    args[2][:] = strength
    torch.testing.assert_close(F.ntm_addressing(*args), compose(*args))


def test_an_all_zero_row_stays_zero():
    args = arguments(dtype=torch.float32)
    args[3][:] = 0
    args[6][0] = 0
    for t in args:
        t.requires_grad_()
    out = F.ntm_addressing(*args)
    assert not out[0].any()
    torch.testing.assert_close(out[1].sum(-1), torch.ones(3))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out[..., 0].sum(), args))


@pytest.mark.parametrize("which", [2, 5])
def test_nan_stays_in_its_row(which):
    args = arguments(dtype=torch.float32)
    args[which][0, 1] = math.nan
    out = F.ntm_addressing(*args)
    assert out[0, 1].isnan().all() and out[1].isfinite().all() and out[0, [0, 2]].isfinite().all()


def test_even_width_is_refused():
    args = arguments(S=4)
    with pytest.raises(ValueError, match=r"memcore.ntm_addressing: 'shift' must have an odd number of shifts S = 2R \+ 1, got S = 4"):
        F.ntm_addressing(*args)
