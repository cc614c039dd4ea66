"""Reads: literal values, and plain arithmetic where the numbers are not finite."""

import math

import pytest
import torch

from memcore.functional import content_addressing, read

pytestmark = pytest.mark.usefixtures("backend")


def test_by_hand():
    memory = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert read(memory, torch.tensor([[[0.5, 0.25, 0.0], [0.0, 0.0, 2.0]]])).tolist() == [[[1.25, 2.0], [10.0, 12.0]]]


def test_shared_memory_by_hand():
    memory = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).requires_grad_()
    w = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    out = read(memory, w)
    assert out.tolist() == [[[1.0, 2.0]], [[2.0, 3.0]]]
    out.sum().backward()
    assert memory.grad.tolist() == [[1.5, 1.5], [0.5, 0.5]]


def test_one_hot_picks_the_row_bit_for_bit():
    memory = torch.randn(2, 63, 20)
    w = torch.nn.functional.one_hot(torch.tensor([[0, 62], [31, 5]]), 63).float()
    assert torch.equal(read(memory, w), torch.stack([memory[0, [0, 62]], memory[1, [31, 5]]]))


def test_zero_weights():
    """0 on finite memory; 0 * NaN and 0 * Inf are NaN, also after everything was masked."""
    memory = torch.randn(1, 5, 3)
    assert not read(memory, torch.zeros(1, 2, 5)).any()
    memory[0, 3, 1] = math.nan
    memory[0, 0, 2] = math.inf
    w = content_addressing(torch.randn(1, 1, 3), memory, mask=torch.zeros(1, 5, dtype=torch.bool))
    out = read(memory, w)
    assert out[0, 0, 0] == 0 and out[0, 0, 1:].isnan().all()


def test_no_slots():
    assert read(torch.zeros(2, 0, 3), torch.zeros(2, 4, 0)).tolist() == torch.zeros(2, 4, 3).tolist()


@pytest.mark.parametrize("H", range(1, 7))
def test_a_memory_past_the_caches(H):
    memory, w = torch.randn(9, 1903, 63), torch.randn(9, H, 1903).softmax(-1)
    torch.testing.assert_close(read(memory, w).double(), w.double() @ memory.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_float32(dtype):
    """4096 ones sum to 4096; a half-precision accumulator stops at 256 or 2048."""
    out = read(torch.ones(1, 4096, 3, dtype=dtype), torch.ones(1, 1, 4096, dtype=dtype))
    assert out.tolist() == [[[4096.0] * 3]]
