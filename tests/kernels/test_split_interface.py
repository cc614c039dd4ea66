"""The interface vector: layout and activations by hand, widths that do not come out whole."""

import math

import pytest
import torch

from memcore.functional import split_interface

pytestmark = pytest.mark.usefixtures("backend")


def test_layout_by_hand():
    """Head by head, read heads first: key 2, strength, gate, shift 3, gamma; the write head goes on with erase 2, add 2."""
    read_head = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, math.log(2), 0.0]
    write_head = [3.0, 4.0, 20.0, math.log(3), 5.0, 5.0, 5.0, math.log(math.e - 1), 0.0, -math.log(3), 7.0, 8.0]
    x = split_interface(torch.tensor([read_head + write_head]), read_heads=1, write_heads=1)
    close = torch.testing.assert_close
    assert x.key.tolist() == [[[1.0, 2.0], [3.0, 4.0]]]
    close(x.strength, torch.tensor([[math.log(2), 20.0]]))
    close(x.gate, torch.tensor([[0.5, 0.75]]))
    close(x.shift, torch.tensor([[[0.25, 0.25, 0.5], [1 / 3] * 3]]))
    close(x.gamma, torch.tensor([[1 + math.log(2), 2.0]]))
    close(x.erase, torch.tensor([[[0.5, 0.25]]]))
    assert x.add.tolist() == [[[7.0, 8.0]]]


@pytest.mark.parametrize("value", [-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])
def test_activations_never_overflow(value):
    x = split_interface(torch.full((1, 20), value, requires_grad=True), read_heads=1, write_heads=1)
    big = max(value, 0.0)
    torch.testing.assert_close(x.strength, torch.full((1, 2), big))
    torch.testing.assert_close(x.gamma, torch.full((1, 2), 1 + big))
    for piece in (x.gate, x.erase):
        torch.testing.assert_close(piece, torch.full_like(piece, float(value > 0)))
    torch.testing.assert_close(x.shift, torch.full((1, 2, 3), 1 / 3))


def test_gradients_at_extremes_are_finite():
    interface = torch.tensor([[1e4, -1e4] * 10], requires_grad=True)
    x = split_interface(interface, read_heads=1, write_heads=1)
    sum(p.sum() for p in x).backward()
    assert interface.grad.isfinite().all()


@pytest.mark.parametrize("size", [13, 15, 19, 21, 0])
def test_width_must_come_out_whole(size):
    with pytest.raises(ValueError, match=rf"memcore.split_interface: 'interface' must have I = 4 W \+ 12 numbers .*, got I = {size}"):
        split_interface(torch.zeros(1, size), read_heads=1, write_heads=1)


def test_bad_heads():
    x = torch.zeros(1, 20)
    with pytest.raises(ValueError, match="memcore.split_interface: 'read_heads' and 'write_heads' must not both be 0"):
        split_interface(x, read_heads=0, write_heads=0)
    with pytest.raises(ValueError, match="memcore.split_interface: 'write_heads' must be at least 0, got -1"):
        split_interface(x, read_heads=1, write_heads=-1)
    with pytest.raises(ValueError, match="memcore.split_interface: 'shift_range' must be at least 0, got -1"):
        split_interface(x, read_heads=1, write_heads=1, shift_range=-1)
    with pytest.raises(TypeError, match="memcore.split_interface: 'read_heads' must be an int, got float"):
        split_interface(x, read_heads=1.0, write_heads=1)
