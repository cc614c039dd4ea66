"""Circular shift: direction, wrapping, one-hot shifts."""

import pytest
import torch

from memcore.functional import circular_shift

pytestmark = pytest.mark.usefixtures("backend")


def test_direction_by_hand():
    """shift[R + 1] = 1 moves the focus to the next slot, and from the last to the first."""
    w = torch.tensor([[[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    ahead = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    assert circular_shift(w, ahead).tolist() == [[[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]


def test_by_hand():
    """out_0 = .25 w_1 + .5 w_0 + .125 w_3 and so on around."""
    w = torch.tensor([[[8.0, 16.0, 32.0, 64.0]]])
    out = circular_shift(w, torch.tensor([[[0.25, 0.5, 0.125]]]))
    assert out.tolist() == [[[4 + 4 + 8.0, 8 + 8 + 1.0, 16 + 16 + 2.0, 2 + 32 + 4.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1, 2, 3, 7, 20, 63, 64, 100, 128, 1000])
@pytest.mark.parametrize("S", [1, 3, 5, 7])
def test_one_hot_is_roll(dtype, N, S):
    """Bit for bit, S > N included."""
    w = torch.randn(2, 2, N).to(dtype)
    for j in range(S):
        shift = torch.zeros(2, 2, S, dtype=dtype)
        shift[..., j] = 1
        assert torch.equal(circular_shift(w, shift), w.roll(j - S // 2, -1))


def test_one_slot_takes_all():
    w, shift = torch.tensor([[[2.0]]]), torch.tensor([[[0.5, 0.25, 1.0, 2.0, 0.25]]])
    assert circular_shift(w, shift).tolist() == [[[8.0]]]


def test_more_shifts_than_slots():
    """N = 2, S = 5: shifts -2, 0, 2 keep the slots, -1 and 1 swap them."""
    out = circular_shift(torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[1.0, 2.0, 4.0, 8.0, 16.0]]]))
    assert out.tolist() == [[[21.0 + 100, 210.0 + 10]]]


def test_gradients_by_hand():
    w, shift = torch.tensor([[[1.0, 2.0, 3.0]]]).requires_grad_(), torch.tensor([[[0.5, 0.25, 0.125]]]).requires_grad_()
    circular_shift(w, shift)[0, 0, 0].backward()  # .5 w_1 + .25 w_0 + .125 w_2
    assert w.grad.tolist() == [[[0.25, 0.5, 0.125]]] and shift.grad.tolist() == [[[2.0, 1.0, 3.0]]]


def test_even_width_is_refused():
    for S in (0, 2, 4):
        with pytest.raises(ValueError, match=rf"memcore.circular_shift: 'shift' must have an odd number of shifts S = 2R \+ 1, got S = {S}"):
            circular_shift(torch.randn(1, 1, 5), torch.randn(1, 1, S))
