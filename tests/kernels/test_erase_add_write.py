"""Erase/add writes: literal values, exact zeros, untouched rows, the in-place form."""

import pytest
import torch

from memcore import reference
from memcore.functional import erase_add_write, erase_add_write_

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def arguments(B=2, N=7, W=5, H=2, dtype=torch.float32):
    memory, weights = torch.randn(B, N, W), torch.randn(B, H, N).softmax(-1)
    erase, add = torch.rand(B, H, W), torch.randn(B, H, W)
    return [t.to(dtype) for t in (memory, weights, erase, add)]


def test_by_hand():
    """All erasures, then all additions: 8 (1 - .5)(1 - .25) + .5 * 2 + .25 * 4."""
    memory = torch.tensor([[[8.0, 16.0], [1.0, 1.0]]])
    weights = torch.tensor([[[0.5, 0.0], [0.25, 1.0]]])
    erase = torch.tensor([[[1.0, 0.0], [1.0, 0.5]]])
    add = torch.tensor([[[2.0, -2.0], [4.0, 0.0]]])
    assert erase_add_write(memory, weights, erase, add).tolist() == [[[5.0, 13.0], [4.0, 0.5]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_erasure_is_exactly_zero(dtype):
    memory, weights, erase, add = arguments(dtype=dtype)
    weights[:, 0, 3], erase[:, 0] = 1, 1
    add.zero_()
    assert not erase_add_write(memory, weights, erase, add)[:, 3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, W", [(1, 1), (7, 3), (63, 20), (100, 64)])
def test_rows_with_zero_weights_are_untouched(dtype, N, W):
    memory, weights, erase, add = arguments(N=N, W=W, H=3, dtype=dtype)
    weights[:, :, ::2] = 0
    out = erase_add_write(memory, weights, erase, add)
    assert torch.equal(out[:, ::2], memory[:, ::2])
    if N > 1:
        assert not torch.equal(out[:, 1::2], memory[:, 1::2])


def test_no_heads_change_nothing():
    memory, weights, erase, add = arguments(H=0)
    assert torch.equal(erase_add_write(memory, weights, erase, add), memory)


def test_head_order_does_not_matter():
    memory, weights, erase, add = arguments(H=5)
    out = erase_add_write(memory, weights, erase, add)
    torch.testing.assert_close(erase_add_write(memory, weights.flip(1), erase.flip(1), add.flip(1)), out)


@pytest.mark.parametrize("H", range(1, 7))
@pytest.mark.parametrize("N, W", [(7, 3), (63, 20), (16, 64), (9, 41)])
def test_any_number_of_heads(H, N, W):
    made = arguments(N=N, W=W, H=H)
    wanted = reference.erase_add_write(*(t.double() for t in made))
    torch.testing.assert_close(erase_add_write(*made).double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_memory_past_the_caches():
    made = arguments(B=9, N=1903, W=63, H=4)  # written past them, too
    wanted = reference.erase_add_write(*(t.double() for t in made))
    torch.testing.assert_close(erase_add_write(*made).double(), wanted, rtol=1e-5, atol=1e-6)


def test_gradient_through_an_exact_zero_factor():
    """Where one head erases all, the other factors' gradients must not divide by it."""
    memory, weights, erase, add = arguments(B=1, N=3, W=2, H=3, dtype=torch.float64)
    weights[0, 1, 0] = weights[0, 2, 1] = weights[0, 0, 1] = 1
    erase[:] = 1
    args = [t.requires_grad_() for t in (memory, weights, erase, add)]
    c = torch.randn(1, 3, 2).double()
    found = torch.autograd.grad((erase_add_write(*args) * c).sum(), args)
    wanted = torch.autograd.grad((reference.erase_add_write(*args) * c).sum(), args)
    for a, e in zip(found, wanted):
        torch.testing.assert_close(a, e)


# In place -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, W, H", [(1, 1, 2), (7, 3, 1), (63, 20, 3), (63, 20, 4), (9, 41, 5), (1000, 64, 2)])
def test_in_place_is_the_same(dtype, N, W, H):
    memory, weights, erase, add = arguments(N=N, W=W, H=H, dtype=dtype)
    wanted = erase_add_write(memory, weights, erase, add)
    version, place = memory._version, memory.data_ptr()
    assert erase_add_write_(memory, weights, erase, add) is memory
    assert torch.equal(memory, wanted) and memory.data_ptr() == place
    assert memory._version == version + 1


def test_in_place_keeps_the_memorys_dtype():
    memory, weights, erase, add = arguments()
    half = memory.bfloat16()
    wanted = erase_add_write(half, weights, erase, add)
    assert wanted.dtype == torch.float32
    assert erase_add_write_(half, weights, erase, add).dtype == torch.bfloat16
    assert torch.equal(half, wanted.bfloat16())


def test_in_place_into_a_strided_view():
    memory, weights, erase, add = arguments()
    big = torch.zeros(5, 14, 2, 2)
    view = big[:, ::2, :, 1].permute(2, 1, 0)
    view.copy_(memory)
    erase_add_write_(view, weights, erase, add)
    torch.testing.assert_close(view, erase_add_write(memory, weights, erase, add))
    assert not big[:, 1::2].any() and not big[..., 0].any()


def test_in_place_refuses_overlapping_memory():
    _, weights, erase, add = arguments()
    for memory in (torch.randn(1, 7, 5).expand(2, 7, 5), torch.randn(2, 7, 1).expand(2, 7, 5)):
        with pytest.raises(RuntimeError, match="memcore.erase_add_write_: 'memory' must not have elements that share storage, got strides"):
            erase_add_write_(memory, weights, erase, add)
    erase_add_write_(torch.randn(1, 7, 5).expand(1, 7, 5), weights[:1], erase[:1], add[:1])


def test_in_place_on_a_leaf():
    memory, weights, erase, add = arguments()
    memory.requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        erase_add_write_(memory, weights, erase, add)
    with torch.no_grad():
        erase_add_write_(memory, weights, erase, add)


def test_in_place_is_differentiable():
    """On a non-leaf, to second order, and on a plain memory whose other arguments want gradients."""
    args = [t.double().requires_grad_() for t in arguments()]
    c = torch.randn(2, 7, 5).double()

    def both(f):
        memory = args[0] * 1
        total = (f(memory, *args[1:]) * c).sum()
        first = torch.autograd.grad(total, args, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), args)]

    for a, e in zip(both(erase_add_write_), both(reference.erase_add_write)):
        torch.testing.assert_close(a, e)
    plain = args[0].detach().clone()
    found = torch.autograd.grad((erase_add_write_(plain, *args[1:]) * c).sum(), args[1:])
    assert plain.requires_grad
    for a, e in zip(found, torch.autograd.grad((reference.erase_add_write(*args) * c).sum(), args[1:])):
        torch.testing.assert_close(a, e)


def test_in_place_bumps_the_version_counter():
    """A graph that saved the memory before is told."""
    memory, weights, erase, add = arguments()
    x = torch.ones(2, 7, 5, requires_grad=True)
    y = (x * memory).sum()
    with torch.no_grad():
        erase_add_write_(memory, weights, erase, add)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_in_place_under_inference_mode():
    memory, weights, erase, add = arguments()
    wanted = erase_add_write(memory, weights, erase, add)
    with torch.inference_mode():
        erase_add_write_(memory, weights, erase, add)
        inside = memory.clone()
        erase_add_write_(inside, weights, erase, add)
    assert torch.equal(memory, wanted)


def test_in_place_compiles_and_checks():
    memory, weights, erase, add = arguments()
    wanted = erase_add_write(memory, weights, erase, add)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: erase_add_write_(*a) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(memory, weights, erase, add), 2 * wanted)
    torch.testing.assert_close(memory, wanted)
    torch.library.opcheck(torch.ops.memcore.erase_add_write_.default, tuple(arguments()), test_utils=("test_schema", "test_faketensor"))


def test_in_place_speaks_for_itself():
    memory, weights, erase, add = arguments()
    with pytest.raises(ValueError, match=r"memcore.erase_add_write_: 'erase' must have shape \(B, H, W\) = \(2, 2, 5\) to match 'memory' \(2, 7, 5\), got \(2, 2, 4\)"):
        erase_add_write_(memory, weights, erase[..., 1:], add)
