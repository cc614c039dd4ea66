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


def whole(Q, N, D, order):
    """Queries and keys of whole numbers, so that scores are distances, in an order of the keys that a search by tiles and lists may mind."""
    g = torch.Generator().manual_seed(Q + N + D)
    query = torch.randint(0, 2, (Q, D), generator=g)
    keys = torch.randint(-3, 4, (N, D), generator=g)
    keys[:, 0] += torch.arange(N) // {"ties": N, "steps": 40}.get(order, 1)
    if order in ("falling", "steps"):  # every tile is nearer than those before
        keys = keys.flip(0)
    elif order == "last":  # all that are near in one shard
        keys = keys.roll(-(N // 4), 0)
    elif order == "no numbers":
        keys = keys.float()
        keys[: N // 2 : 2, -1], keys[1 : N // 2 : 2, 0], keys[N // 2 :: 3, 0] = torch.nan, torch.inf, 3e38
    return query.float(), keys.float()


def same_as_brute_force(Q, N, D, k, order, metric="l2", dtype=torch.float32):
    query, keys = whole(Q, N, D, order)
    wanted, at = brute_force(query, keys.nan_to_num(torch.inf), k, metric)
    wanted = wanted.nan_to_num(torch.inf)
    with cuda_shim.use():
        d, i = knn_search(query.to(dtype), keys.to(dtype), k, metric=metric)
    assert torch.equal(d, wanted.to(dtype)) and torch.equal(i, at)


@pytest.mark.parametrize("Q", [1, 6])
def test_rows_that_float32_cannot_tell_apart(Q):
    """More of them than a list keeps, in the first shard; those of the others, which are there too, tell nothing of them."""
    g = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(512, 100, generator=g, dtype=torch.float64), dim=1)
    keys[256:] *= 3
    query, keys = torch.zeros(Q, 100), keys.float()
    d, i = brute_force(query, keys, 5, "l2")
    near = (keys.double() ** 2).sum(1).float()
    assert (near == d[0, 4]).sum() > 1  # ties after all, told apart by their rows
    with cuda_shim.use():
        found, at = knn_search(query, keys, 5)
    assert torch.equal(found, d) and torch.equal(at, i)


@pytest.mark.parametrize("order", ["rising", "falling", "steps", "ties", "last", "no numbers"])
@pytest.mark.parametrize("Q, k, N", [(1, 5, 2100), (4, 130, 2100), (6, 50, 1600), (33, 3, 1000), (6, 128, 1500)])
def test_lists_that_are_full(Q, k, N, order):
    """On one multiprocessor lists of the scan fill, in two blocks or one; ties are more than any list has places for."""
    with cuda_shim.processors(1):
        same_as_brute_force(Q, N, 3, k, order)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("order", ["rising", "falling", "ties"])
def test_candidates_of_more_shards_than_the_finish_has_room_for(order, metric):
    same_as_brute_force(5, 8000, 2, 3, order, metric)


@pytest.mark.parametrize("Q, k", [(1, 4), (5, 4), (5, 100), (2, 140)])
def test_numbers_of_rows_next_to_those_of_tiles_and_lists(Q, k):
    keep = k + (32 if k <= 128 else k // 4)
    edges = {keep, keep + 16, 128, 248, 256, keep + 512, 768} if Q == 1 else {keep, 128, 248, 2 * 128 + 248 - keep}
    for N in sorted(n + more for n in edges for more in (-1, 0, 1) if n + more >= k):
        for processors in (1, 132):
            with cuda_shim.processors(processors):
                same_as_brute_force(Q, N, 1, k, "falling")


COLUMNS = (1, 4, 31, 36, 128, 132, 161)
TYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROW_TILES = [pytest.param(37, D, t, marks=[] if D == 31 else [pytest.mark.slow]) for D in COLUMNS for t in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(
    "Q, D, dtype", [*((Q, D, t) for Q in (1, 2) for D in COLUMNS for t in TYPES), *((37, D, torch.float32) for D in COLUMNS), *NARROW_TILES]
)
def test_columns_of_any_number_and_place(Q, D, dtype):
    """By fours and alone, in chunks, queries that stay in shared memory and others; tensors that begin anywhere."""
    query, keys = (t / 16 for t in whole(Q, 300, D, "ties"))
    wanted, at = brute_force(query, keys, 9)
    for skip in (0, 1, 4):
        placed = [torch.cat([torch.full((skip,), torch.nan), t.flatten()]).to(dtype)[skip:].view_as(t) for t in (query, keys)]
        with cuda_shim.use(), cuda_shim.processors(2):
            d, i = knn_search(*placed, 9)
        assert torch.equal(d, wanted.to(dtype)) and torch.equal(i, at)


@pytest.mark.parametrize("order", ["reverse", "random:3"])
def test_candidates_come_in_any_order(order):
    query, keys = drawn(9, 1500, 4, 3, "normal", torch.float32)
    with cuda_shim.use(), cuda_shim.processors(1):
        wanted = [knn_search(query[:n], keys, 20) for n in (1, 9)]
        with cuda_shim.schedule(order):
            found = [knn_search(query[:n], keys, 20) for n in (1, 9)]
    assert all(torch.equal(a, b) for f, w in zip(found, wanted) for a, b in zip(f, w))


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
