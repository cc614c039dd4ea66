"""MANN's write: literal values, the chosen slot, options."""

import math

import pytest
import torch

from memcore import reference
from memcore.functional import least_used, lrua_write

pytestmark = pytest.mark.usefixtures("backend")


def by_hand(**options):
    memory = torch.tensor([[[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]])
    key = torch.tensor([[[1.0, -1.0], [2.0, 0.5]]])
    previous = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]])
    usage = torch.tensor([[3.0, 0.5, 0.5]])
    gate = torch.tensor([[0.25, 1.0]])
    memory, weights = lrua_write(memory, key, previous, usage, gate, **options)
    return memory.tolist(), weights.tolist()


def test_by_hand():
    """Slot 1 is least used (slot 2 ties, the lower wins): head 0 puts 3/4 there, head 1 keeps to what it read."""
    memory, weights = by_hand()
    assert weights == [[[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]]
    assert memory == [[[1.25, 1.75], [0.75 + 1.0, -0.75 + 0.25], [101.0, 200.25]]]


def test_without_zeroing():
    memory, weights = by_hand(zero=None)
    assert weights == [[[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]]
    assert memory == [[[1.25, 1.75], [11.75, 19.5], [101.0, 200.25]]]


def test_another_word():
    memory, weights = by_hand(add=torch.tensor([[[4.0, 0.0], [0.0, 8.0]]]))
    assert weights == [[[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]]
    assert memory == [[[2.0, 2.0], [3.0, 4.0], [100.0, 204.0]]]


@pytest.mark.parametrize("usage, slot", [
    ([0.0, -0.0, 1.0], 0), ([-0.0, 0.0, 1.0], 0), ([math.nan, 2.0, 1.0], 2), ([math.nan, math.inf, math.nan], 1), ([math.nan] * 3, 0), ([math.inf] * 3, 0), ([1.0, -math.inf, 0.0], 1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_chosen_slot(usage, slot, dtype):
    usage = torch.tensor([usage], dtype=dtype)
    one = torch.ones(1, 1, 2, dtype=dtype)
    memory, weights = lrua_write(torch.full((1, 3, 2), 5.0, dtype=dtype), one, torch.zeros(1, 1, 3, dtype=dtype), usage, torch.zeros(1, 1, dtype=dtype))
    assert weights[0, 0].tolist() == [float(i == slot) for i in range(3)]
    assert memory[0].tolist() == [[1.0, 1.0] if i == slot else [5.0, 5.0] for i in range(3)]
    assert least_used(usage, 1).item() == slot


def test_a_memory_past_the_caches():
    made = torch.randn(9, 1903, 63), torch.randn(9, 3, 63), torch.randn(9, 3, 1903).softmax(-1), torch.rand(9, 1903), torch.rand(9, 3)
    args, wide = ([t.to(dtype).requires_grad_(i != 3) for i, t in enumerate(made)] for dtype in (torch.float32, torch.float64))
    got, wanted = lrua_write(*args), reference.lrua_write(*wide)
    grads = [torch.randn_like(y) for y in got]
    found = torch.autograd.grad(got, [args[i] for i in (0, 1, 2, 4)], grads)
    right = torch.autograd.grad(wanted, [wide[i] for i in (0, 1, 2, 4)], [g.double() for g in grads])
    for a, e in zip((*got, *found), (*wanted, *right), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("N", [1, 7, 63, 128, 1000])
def test_it_is_least_used(N):
    usage = (torch.rand(4, N) * 9).floor()
    zeros = torch.zeros(4, 2, N)
    _, weights = lrua_write(torch.zeros(4, N, 3), torch.zeros(4, 2, 3), zeros, usage, torch.zeros(4, 2))
    assert torch.equal(weights.argmax(-1), least_used(usage, 1).expand(4, 2)) and weights.sum() == 8


def test_zeroed_slot_forgets_nan():
    """What stood in the least-used slot is gone, NaN included, and gets gradient 0."""
    memory = torch.randn(1, 3, 2)
    memory[0, 1] = math.nan
    memory.requires_grad_()
    word = torch.randn(1, 1, 2)
    out, _ = lrua_write(memory, word, torch.zeros(1, 1, 3), torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 1))
    torch.testing.assert_close(out[0], torch.stack([memory[0, 0], word[0, 0], memory[0, 2]]).detach())
    out.sum().backward()
    assert memory.grad[0].tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


def test_gradients_by_hand():
    memory = torch.tensor([[[1.0], [10.0]]]).requires_grad_()
    key = torch.tensor([[[3.0]]]).requires_grad_()
    previous = torch.tensor([[[0.5, 0.25]]]).requires_grad_()
    usage = torch.tensor([[1.0, 0.0]]).requires_grad_()
    gate = torch.tensor([[0.25]]).requires_grad_()
    out, weights = lrua_write(memory, key, previous, usage, gate)  # weights .125, .0625 + .75
    (out[0, 0, 0] + 10 * out[0, 1, 0] + 100 * weights[0, 0, 1]).backward()
    assert memory.grad.tolist() == [[[1.0], [0.0]]]
    assert key.grad.tolist() == [[[0.125 + 8.125]]]
    assert previous.grad.tolist() == [[[0.25 * 3, 0.25 * (30 + 100)]]]
    assert gate.grad.tolist() == [[0.5 * 3 + (0.25 - 1) * 130]]
    assert usage.grad is None


def test_unused_key_gets_no_gradient():
    key, add = torch.randn(1, 1, 2, requires_grad=True), torch.randn(1, 1, 2, requires_grad=True)
    out, _ = lrua_write(torch.randn(1, 3, 2), key, torch.rand(1, 1, 3), torch.rand(1, 3), torch.rand(1, 1), add=add)
    out.sum().backward()
    assert key.grad is None and add.grad.any()


def test_no_slots():
    memory, weights = lrua_write(torch.zeros(2, 0, 3), torch.randn(2, 4, 3), torch.zeros(2, 4, 0), torch.zeros(2, 0), torch.rand(2, 4))
    assert memory.shape == (2, 0, 3) and weights.shape == (2, 4, 0)


def test_bad_zero():
    with pytest.raises(ValueError, match="memcore.lrua_write: 'zero' must be 'least_used' or None, got True"):
        by_hand(zero=True)
