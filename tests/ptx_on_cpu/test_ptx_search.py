"""The searches' compiled Triton kernels: the edges that the operators' own tests name, neighbours against brute force, and every way through them."""

import pytest
import torch

from contract import check_row_gradients
from ptx_machine import ORDERS
from ptx_suite import Emulator, emulated, missing

if missing("triton"):
    pytest.skip(missing("triton"), allow_module_level=True)

from memcore.functional import knn_lookup, knn_search
from memcore.kernels import _triton
import test_knn_lookup
import test_knn_search
from test_knn_lookup import test_values as test_values_of_the_read
from test_knn_search import (
    brute_force, drawn, test_cosine_of_zero_and_of_next_to_nothing, test_count, test_distances_that_overflow, test_keys_that_are_no_numbers_come_last,
    test_lowest_index_wins_a_tie, test_padding_and_nothing_at_all, test_values,
)  # fmt: skip

__all__ = [
    "test_cosine_of_zero_and_of_next_to_nothing", "test_count", "test_distances_that_overflow", "test_keys_that_are_no_numbers_come_last",
    "test_lowest_index_wins_a_tie", "test_padding_and_nothing_at_all", "test_values", "test_values_of_the_read",
]  # fmt: skip


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def backend():
    with emulated(Emulator("triton", 80, orders=("lockstep",), races=False)):
        yield "triton"


@pytest.fixture
def small_blocks(monkeypatch):
    """Few candidates beyond K and short tiles: every loop turns, lists are cut again and again, shards are many."""
    for name, size in (("search", 32), ("slack", 2), ("row", 16)):
        monkeypatch.setattr(_triton.sizes, name, size)


@pytest.mark.parametrize("metric", ["l2", slow("cosine"), slow("ip")])
def test_a_query_that_is_no_number(backend, metric):
    test_knn_search.test_a_query_that_is_no_number(backend, metric)


@pytest.mark.parametrize("kernel", ["inverse_distance", slow("softmax"), slow("uniform")])
def test_edges(backend, kernel):
    test_knn_lookup.test_edges(backend, kernel)


@pytest.mark.parametrize("kernel, delta", [("inverse_distance", 1e-300), slow("softmax", 1e-300), ("inverse_distance", 1e30), slow("softmax", 1e30)])
def test_any_width_of_the_kernel(backend, kernel, delta):
    test_knn_lookup.test_any_width_of_the_kernel(backend, kernel, delta)


@pytest.mark.slow
def test_all_dictionaries_in_one_call(backend):
    test_knn_lookup.test_all_dictionaries_in_one_call(backend)


# Q, N, D, k, metric, kind, type: several shards; many ties; cancellation; keys that come nearer and nearer; all of few rows.
SEARCHES = [
    (9, 300, 8, 5, "l2", "normal", torch.float32),
    (3, 800, 3, 3, "l2", "sorted", torch.float32),  # a turn over the shards' second best finds nothing, the next one does
    slow(3, 200, 17, 20, "l2", "coarse", torch.float32),
    slow(5, 150, 3, 7, "ip", "far", torch.float32),
    slow(3, 260, 8, 12, "ip", "sorted", torch.bfloat16),
    slow(5, 180, 8, 3, "l2", "clusters", torch.float16),
]


@pytest.mark.parametrize("Q, N, D, k, metric, kind, dtype", SEARCHES)
def test_against_brute_force(Q, N, D, k, metric, kind, dtype, small_blocks):
    query, keys = drawn(Q, N, D, 7, kind, dtype)
    wanted, at = brute_force(query, keys, k, metric)
    emulator = Emulator("triton", 80, orders=ORDERS if N <= 300 else ("lockstep",))
    with emulated(emulator):
        d, i = knn_search(query, keys, k, metric=metric)
    assert emulator.records[0].kernel == "knn_search_fwd_kernel_scan" and emulator.records[0].grid[0] > (Q + 7) // 8  # shards
    assert torch.equal(i, at) and torch.equal(d, wanted.to(dtype))


def finished(query, keys, k, metric):
    """Distances, indices, and how many times over the keys were read by the launch that finishes the search."""
    emulator = Emulator("triton", 80, orders=("lockstep",), races=False, count=True)
    with emulated(emulator):
        d, i = knn_search(query, keys, k, metric=metric)
    return d, i, emulator.records[-1].report.traffic["keys"].load_bytes / (keys.numel() * keys.element_size())


@pytest.mark.parametrize("metric", ["l2", slow("cosine"), slow("ip")])
def test_what_cannot_be_certified_is_compared_with_every_row(metric, small_blocks):
    """Copies of one key, more than are kept; else the rows of the candidates alone are read again."""
    query, keys = drawn(2, 120, 8, 3, "normal", torch.float32)
    *_, once = finished(query, keys, 3, metric)
    assert once <= 2 * (2 if metric == "cosine" else 1) * 5 / 120 + 1e-6
    keys[20:] = keys[:1]
    d, i, every = finished(keys[:2].clone(), keys, 9, metric)
    wanted = brute_force(keys[:2], keys, 9, metric)
    assert every > 0.9
    if metric == "ip":
        assert torch.equal(i, wanted[1])
    else:
        assert d[0].eq(0).all() and i[0].tolist() == [0, *range(20, 28)]


@pytest.mark.parametrize("metric", [slow("cosine"), "ip"])
def test_every_row_in_any_order(metric, small_blocks):
    """Keys of whose length float32 has no square: all rows are compared. The first query's nearest but one come first, then each row is nearer than the last."""
    query, keys = drawn(3, 150, 8, 9, "normal", torch.float32)
    order = brute_force(query[:1], keys, 150, metric)[1][0]
    keys = 1e20 * keys[torch.cat([order[:8], order[8:].flip(0)])]
    d, i, every = finished(query, keys, 9, metric)
    wanted = knn_search(query, keys, 9, metric=metric)
    assert every > 0.9 and torch.equal(i, wanted[1]) and torch.allclose(d, wanted[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", ["cosine", slow("ip")])
def test_queries_of_any_length(metric, small_blocks):
    """Whose squares, or whose inverse lengths, float32 does not hold: the scan's candidates are certain all the same."""
    query, keys = drawn(4, 120, 8, 5, "normal", torch.float32)
    query *= torch.tensor([1e30, 1e-30, 1e-20, 3e37])[:, None]
    d, i, read = finished(query, keys, 5, metric)
    wanted = knn_search(query, keys, 5, metric=metric)
    usual = [0, 3] if metric == "cosine" else [0, 1, 2, 3]  # others are shorter than eps: of like similarity to all
    assert torch.equal(i[usual], wanted[1][usual]) and torch.allclose(d, wanted[0], rtol=1e-6, atol=0)
    assert read < (5 if metric == "cosine" else 1)  # under cosine twice by each query that fails


@pytest.mark.parametrize("metric", ["l2", slow("cosine")])
def test_a_row_finds_itself_at_distance_zero(backend, metric):
    """Far from the origin, where float32 products would be off by 0.1."""
    keys = 1000 + torch.randn(200, 20)
    query = keys[:3].clone().requires_grad_()
    d, i = knn_search(query, keys, 2, metric=metric)
    assert i[:, 0].tolist() == [0, 1, 2] and (d[:, 0] == 0).all()
    (grad,) = torch.autograd.grad(d[:, 0].sum(), query)
    assert (grad == 0).all()


@pytest.mark.parametrize("metric", [slow("l2"), "cosine", slow("ip")])
def test_no_gradient_of_a_query_that_is_no_number(backend, metric):
    query, keys = torch.tensor([[float("nan"), 1.0], [1.0, 2.0]], requires_grad=True), torch.randn(40, 2, requires_grad=True)
    d, _ = knn_search(query, keys, 3, metric=metric)
    grads = torch.autograd.grad(d.nan_to_num(0).sum(), [query, keys])
    assert (grads[0][0] == 0).all() and all(g.isfinite().all() and g.any() for g in grads)


def test_workspaces_that_hold_what_looks_like_candidates(backend, monkeypatch):
    """Zeros: row 0 at score 0. Tests' memory is full of NaN else, and of the greatest integers, which are nobody."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *sizes, **options: empty(self, *sizes, **options).zero_())
    keys = torch.randn(2, 63, 7)
    d, i = knn_search(keys[:, 3:5], keys, 5, count=torch.tensor([4, 60]))
    assert i[0, :, 4].tolist() == [-1, -1] and (i[0, :, :4] >= 0).all() and i[1, :, 0].tolist() == [3, 4] and (d[1, :, 0] == 0).all()
    assert i[0, 0, 0] == 3 and sorted(i[0, 0, :4].tolist()) == [0, 1, 2, 3]


def test_stacked_dictionaries_of_no_width(backend):
    query, keys = torch.zeros(2, 3, 0, requires_grad=True), torch.zeros(2, 4, 0, requires_grad=True)
    d, i = knn_search(query, keys, 2)
    assert d.tolist() == [[[0.0, 0.0]] * 3] * 2 and i.tolist() == [[[0, 1]] * 3] * 2
    d.sum().backward()


def test_as_many_neighbours_as_there_may_be(backend):
    keys = torch.arange(1400.0)[:, None].requires_grad_()
    d, i = knn_search(torch.zeros(1, 1), keys, 1024)
    assert i.tolist() == [list(range(1024))] and d[0, -1] == 1023.0**2
    d.sum().backward()
    assert torch.equal(keys.grad[:, 0], torch.where(torch.arange(1400) < 1024, 2 * torch.arange(1400.0), 0))


@pytest.mark.parametrize("shape", [slow(()), (2,)])
def test_gradients_of_the_rows_that_are_used(backend, shape):
    emulator = Emulator("triton", 80)
    check_row_gradients(emulator.triton, shape)
    query, keys, none = torch.randn(*shape, 7, 4), torch.randn(*shape, 0, 4), torch.full((*shape, 7, 6), -1)
    nothing = emulator.triton("knn_search", "rows", (torch.randn(*shape, 7, 6), none, query, keys, 0))
    assert nothing[1].shape == (len(shape) + 1, 0) and nothing[2].shape == (0, 4) and not nothing[0].any()
