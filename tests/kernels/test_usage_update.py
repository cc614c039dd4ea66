"""Usage: literal values and the decay argument."""

import math

import pytest
import torch

from memcore.functional import usage_update

pytestmark = pytest.mark.usefixtures("backend")


def test_by_hand():
    usage, reads, writes = torch.tensor([[4.0, 8.0]]), torch.tensor([[[1.0, 0.0], [0.5, 2.0]]]), torch.tensor([[[0.25, 1.0]]])
    assert usage_update(usage, reads, writes, 0.5).tolist() == [[3.75, 7.0]]


def test_gradients_by_hand():
    usage, reads, writes = torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(1, 1, 2)
    for t in (usage, reads, writes):
        t.requires_grad_()
    (usage_update(usage, reads, writes, 0.25) * torch.tensor([1.0, 4.0])).sum().backward()
    assert usage.grad.tolist() == [[0.25, 1.0]]
    assert reads.grad.tolist() == [[[1.0, 4.0]] * 3] and writes.grad.tolist() == [[[1.0, 4.0]]]


def test_bad_decay():
    args = torch.ones(1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"memcore.usage_update: 'decay' must be finite, got {bad}"):
            usage_update(*args, bad)
    for bad in ("0.9", None, True, torch.tensor(0.9)):
        with pytest.raises(TypeError, match="memcore.usage_update: 'decay' must be a number, got"):
            usage_update(*args, bad)
