"""The searches' CUDA kernels, their source run on the CPU: the edges that the operators' own tests name, and neighbours against brute force."""

import cuda_shim
import pytest
import shim_build
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import check_row_gradients
from memcore import _backend
from memcore.functional import knn_lookup, knn_search
from test_knn_lookup import test_all_dictionaries_in_one_call, test_any_width_of_the_kernel, test_edges, test_values as test_values_of_the_read
from test_knn_search import (
    brute_force, drawn, test_a_query_that_is_no_number, test_cosine_of_zero_and_of_next_to_nothing, test_count, test_distances_that_overflow,
    test_keys_that_are_no_numbers_come_last, test_lowest_index_wins_a_tie, test_padding_and_nothing_at_all, test_values,
)  # fmt: skip

__all__ = [
    "test_a_query_that_is_no_number", "test_all_dictionaries_in_one_call", "test_any_width_of_the_kernel", "test_cosine_of_zero_and_of_next_to_nothing",
    "test_count", "test_distances_that_overflow", "test_edges", "test_keys_that_are_no_numbers_come_last", "test_lowest_index_wins_a_tie",
    "test_padding_and_nothing_at_all", "test_values", "test_values_of_the_read",
]  # fmt: skip


@settings(max_examples=20)
@given(
    st.integers(1, 40), st.integers(0, 900), st.sampled_from([1, 3, 8, 33]), st.integers(0, 150), st.integers(0, 2**31),
    st.sampled_from(["normal", "clusters", "coarse", "sorted", "far"]), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["l2", "ip"]),
)  # fmt: skip
def test_against_brute_force(Q, N, D, k, seed, kind, dtype, metric):
    """Keys of any order and density; coarse ones have many ties."""
    query, keys = drawn(Q, N, D, seed, kind, dtype)
    wanted, at = brute_force(query, keys, k, metric)
    with cuda_shim.use():
        d, i = knn_search(query, keys, k, metric=metric)
    n = min(k, N)
    assert (i[:, n:] == -1).all() and (d[:, n:] == torch.inf).all()
    assert torch.equal(d[:, :n], wanted.to(dtype)) or torch.allclose(d[:, :n], wanted.to(dtype), rtol=2e-7, atol=1e-12)
    same = i[:, :n] == at  # but for runs of distances whose float64 sums round to neighbours
    step = wanted.diff(dim=-1).abs() <= 3e-7 * wanted[:, 1:].abs()
    run = torch.nn.functional.pad(step, (1, 0)) | torch.nn.functional.pad(step, (0, 1), value=True)
    assert (same | run).all() and (same.all() or kind != "coarse")


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("Q", [3, 40])
def test_a_row_finds_itself_at_distance_zero(backend, metric, Q):
    """Far from the origin, where float32 products would be off by 0.1: what cannot be certified is compared with every row."""
    keys = 1000 + torch.randn(200, 20)
    query = keys[:Q].clone().requires_grad_()
    d, i = knn_search(query, keys, 2, metric=metric)
    assert i[:, 0].tolist() == list(range(Q)) and (d[:, 0] == 0).all()
    (grad,) = torch.autograd.grad(d[:, 0].sum(), query)
    assert (grad == 0).all()


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_any_number_of_shards(backend, metric):
    """Duplicates lie in other shards; few and many queries take different kernels."""
    keys, query = torch.randn(1500, 5), torch.randn(6, 5)
    keys[750:] = keys[:750]
    many = knn_search(query, keys, 20, metric=metric)
    few = [torch.cat(parts) for parts in zip(*(knn_search(query[a : a + 3], keys, 20, metric=metric) for a in (0, 3)))]
    assert all(torch.equal(a, e) for a, e in zip(many, few))
    assert many[1][:, ::2].max() < 750 and torch.equal(many[1][:, ::2] + 750, many[1][:, 1::2])


def test_gradients_of_rows_that_many_find(backend):
    """Against float64; some keys are found by every query, some by none."""
    g = torch.Generator().manual_seed(5)
    made = [0.1 * torch.randn(9, 4, generator=g), torch.randn(80, 4, generator=g), torch.randn(80, 3, generator=g)]
    made[1][:3] = 0.01 * made[1][:3]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in made]
        found = knn_lookup(*leaves, 6, delta=0.1)
        (found.output.sin().sum() + found.distances.square().sum() + found.weights[:, 0].sum()).backward()
        results.append([t.grad for t in leaves])
        assert torch.bincount(found.indices.flatten(), minlength=80)[:3].max() >= 5
    for a, e in zip(*results):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_gradients_of_the_rows_that_are_used(backend, shape):
    check_row_gradients(lambda op, way, args: cuda_shim.kernels(op, way)(*args), shape)


def test_too_many_neighbours_are_refused(backend):
    query, keys = torch.zeros(1, 2), torch.zeros(3, 2)
    assert f"kMostNeighbours = {_backend.MOST};" in (shim_build.CUDA / "knn_search.h").read_text()
    with pytest.raises(RuntimeError, match="memcore.knn_search: the CUDA kernels find up to 1024 neighbours, got 1025"):
        knn_search(query, keys, 1025)
    d, i = knn_search(torch.zeros(1, 1), torch.arange(1400.0)[:, None], 1024)
    assert i.tolist() == [list(range(1024))] and d[0, -1] == 1023.0**2
