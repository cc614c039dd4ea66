"""Interpolation: literal values and gates that pass one side on."""

import pytest
import torch

from memcore.functional import interpolate

pytestmark = pytest.mark.usefixtures("backend")


def test_by_hand():
    w = interpolate(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]]), torch.tensor([[0.25]]))
    assert w.tolist() == [[[0.25, 3.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1, 7, 64, 100])
def test_gate_0_and_1_are_bit_exact(dtype, N):
    content, previous = torch.randn(2, 3, N).to(dtype), torch.randn(2, 3, N).to(dtype)
    content[..., 0], previous[..., -1] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    assert torch.equal(interpolate(content, previous, torch.ones(2, 3, dtype=dtype)), content)
    assert torch.equal(interpolate(content, previous, torch.zeros(2, 3, dtype=dtype)), previous)


def test_gradients_by_hand():
    content, previous = torch.tensor([[[1.0, 2.0]]]).requires_grad_(), torch.tensor([[[5.0, 7.0]]]).requires_grad_()
    gate = torch.tensor([[0.25]], requires_grad=True)
    (interpolate(content, previous, gate) * torch.tensor([1.0, 10.0])).sum().backward()
    assert content.grad.tolist() == [[[0.25, 2.5]]] and previous.grad.tolist() == [[[0.75, 7.5]]]
    assert gate.grad.tolist() == [[-54.0]]  # (1 - 5) + 10 (2 - 7)
