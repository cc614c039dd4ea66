"""The least-used slots: order, ties, signed zeros, NaN, counts."""

import math

import pytest
import torch

from memcore.functional import least_used

pytestmark = pytest.mark.usefixtures("backend")
NAN = math.nan


def test_by_hand():
    assert least_used(torch.tensor([[3.0, 1.0, 2.0], [0.0, -5.0, 0.5]]), 2).tolist() == [[1, 2], [1, 0]]


def test_ties_zeros_and_nan():
    """Lowest index first; -0 is 0; NaN is most used, in order of index, after Inf."""
    usage = torch.tensor([[0.0, -0.0, NAN, math.inf, 0.0, -math.inf, NAN, -0.0, math.inf]])
    assert least_used(usage, 9).tolist() == [[5, 0, 1, 4, 7, 3, 8, 2, 6]]
    assert least_used(torch.tensor([[NAN, NAN]]), 1).tolist() == [[0]]
    assert least_used(-torch.tensor([[NAN, 1.0]]), 1).tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1, 3, 7, 20, 63, 64, 100, 128, 1000])
@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
def test_sorted_by_usage_then_index(dtype, N, n):
    usage = (torch.rand(3, N) * 8).floor().to(dtype)
    usage[0] = 0
    usage[1, ::5] = NAN
    keys = [[(math.isnan(u), 0 if math.isnan(u) else u, i) for i, u in enumerate(row)] for row in usage.tolist()]
    assert least_used(usage, n).tolist() == [[i for *_, i in sorted(row)[:n]] for row in keys]


def test_counts():
    usage = torch.rand(2, 5)
    assert least_used(usage, 0).shape == (2, 0)
    assert least_used(usage, 99).shape == (2, 5)
    assert least_used(torch.zeros(2, 0), 3).shape == (2, 0)
    with pytest.raises(ValueError, match="memcore.least_used: 'n' must be at least 0, got -1"):
        least_used(usage, -1)
    for bad in (1.0, True, None):
        with pytest.raises(TypeError, match="memcore.least_used: 'n' must be an int, got"):
            least_used(usage, bad)


def test_not_differentiable():
    out = least_used(torch.rand(2, 5, requires_grad=True), 2)
    assert out.dtype == torch.int64 and not out.requires_grad
