"""One NTM step: the composition of the functions, heads, order."""

import pytest
import torch

from memcore import functional as F

pytestmark = pytest.mark.usefixtures("backend")


def compose(memory, interface, previous, *, read_heads, write_heads, shift_range=1, order="write_read"):
    x = F.split_interface(interface, read_heads=read_heads, write_heads=write_heads, shift_range=shift_range)
    weights = F.ntm_addressing(x.key, memory, x.strength, x.gate, x.shift, x.gamma, previous)
    written = F.erase_add_write(memory, weights[:, read_heads:], x.erase, x.add)
    return F.NTMStep(written, F.read(written if order == "write_read" else memory, weights[:, :read_heads]), weights)


def arguments(R, W, shift_range=1, B=3, N=20, width=7, dtype=torch.float64):
    H = R + W
    size = H * (width + 4 + 2 * shift_range) + 2 * W * width
    return [torch.randn(B, N, width).to(dtype), torch.randn(B, size).to(dtype), torch.randn(B, H, N).softmax(-1).to(dtype)]


@pytest.mark.parametrize("order", ["write_read", "read_write"])
@pytest.mark.parametrize("R, W, shift_range", [(1, 1, 1), (4, 1, 1), (1, 3, 2), (2, 0, 1), (0, 2, 0), (1, 1, 3)])
def test_equals_the_composition(R, W, shift_range, order):
    compare(arguments(R, W, shift_range), R, W, shift_range, order)


@pytest.mark.parametrize("order", ["write_read", "read_write"])
@pytest.mark.parametrize("R, W", [(2, 1), (1, 2)])
def test_a_memory_that_fills_the_second_cache(R, W, order):
    """More than 256 KiB: the CPU kernel goes over it in the other direction the second time."""
    compare(arguments(R, W, B=2, N=1043, width=65), R, W, 1, order)


def compare(args, R, W, shift_range, order):
    args = [t.requires_grad_() for t in args]
    options = {"read_heads": R, "write_heads": W, "shift_range": shift_range, "order": order}
    out, wanted = F.ntm_step(*args, **options), compose(*args, **options)
    assert isinstance(out, F.NTMStep) and out._fields == ("memory", "reads", "weights")
    cs = [torch.randn_like(y) for y in out]
    for y, e in zip(out, wanted):
        torch.testing.assert_close(y, e)
    grads = [torch.autograd.grad(sum((y * c).sum() for y, c in zip(ys, cs)), args) for ys in (out, wanted)]
    for a, e in zip(*grads):
        torch.testing.assert_close(a, e)


def by_hand(order):
    """One slot, one number wide: every weight is 1, whatever the address."""
    key, strength, gate, shift, gamma = 0.3, 0.0, 0.0, [0.0], 0.0
    head = [key, strength, gate, *shift, gamma]
    interface = torch.tensor([head + head + [0.0, 5.0]])  # erase sigmoid(0) = 1/2, add 5
    memory, previous = torch.tensor([[[8.0]]]), torch.ones(1, 2, 1)
    return F.ntm_step(memory, interface, previous, read_heads=1, write_heads=1, shift_range=0, order=order)


def test_order_by_hand():
    after, before = by_hand("write_read"), by_hand("read_write")
    assert after.memory.tolist() == before.memory.tolist() == [[[9.0]]]
    assert after.weights.tolist() == [[[1.0], [1.0]]]
    assert after.reads.tolist() == [[[9.0]]] and before.reads.tolist() == [[[8.0]]]


def test_heads_address_the_memory_that_came_in():
    """A write head that overwrites the slot a read head looks for does not disturb the search."""
    memory = torch.eye(4)[None] * 2
    head = lambda key: [*key, 60.0, 60.0, -60.0, 60.0, -60.0, 60.0]  # noqa: E731  (sharp content address, no shift)
    interface = torch.tensor([head([0, 1, 0, 0]) + head([0, 1, 0, 0]) + [60.0] * 4 + [0.0, 0.0, 0.0, 9.0]])
    out = F.ntm_step(memory, interface, torch.full((1, 2, 4), 0.25), read_heads=1, write_heads=1)
    torch.testing.assert_close(out.weights, torch.tensor([[[0.0, 1, 0, 0]] * 2]))
    torch.testing.assert_close(out.reads, torch.tensor([[[0.0, 0, 0, 9]]]))
    torch.testing.assert_close(out.memory[0, [0, 2, 3]], memory[0, [0, 2, 3]])


def test_gradient_reaches_back_through_a_chain():
    """Ten steps as a recurrence, against the composition."""
    start = arguments(2, 1, N=9, width=4)
    interfaces = torch.randn(10, *start[1].shape).double().requires_grad_()
    memory0, previous0 = (t.requires_grad_() for t in (start[0], start[2]))

    def unroll(step):
        memory, previous, total = memory0, previous0, 0
        for x in interfaces:
            memory, reads, previous = step(memory, x, previous, read_heads=2, write_heads=1)
            total = total + reads.square().sum()
        return torch.autograd.grad(total, (memory0, interfaces, previous0))

    for a, e in zip(unroll(F.ntm_step), unroll(compose)):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


def test_no_write_heads_leave_the_memory():
    args = arguments(2, 0, dtype=torch.float32)
    out = F.ntm_step(*args, read_heads=2, write_heads=0)
    assert torch.equal(out.memory, args[0]) and out.memory.data_ptr() != args[0].data_ptr()


def test_bad_input():
    args = arguments(1, 1)
    heads = {"read_heads": 1, "write_heads": 1}
    with pytest.raises(ValueError, match="memcore.ntm_step: 'order' must be 'write_read' or 'read_write', got 'both'"):
        F.ntm_step(*args, **heads, order="both")
    with pytest.raises(ValueError, match="memcore.ntm_step: 'read_heads' and 'write_heads' must not both be 0"):
        F.ntm_step(*args, read_heads=0, write_heads=0)
    with pytest.raises(ValueError, match=r"memcore.ntm_step: 'interface' must have shape \(B, I\) = \(3, 40\) to match 'memory' \(3, 20, 7\), got \(3, 39\)"):
        F.ntm_step(args[0], args[1][:, 1:], args[2], **heads)
    with pytest.raises(ValueError, match=r"memcore.ntm_step: 'previous' must have shape \(B, H, N\) = \(3, 2, 20\) .*got \(3, 1, 20\)"):
        F.ntm_step(args[0], args[1], args[2][:, 1:], **heads)
