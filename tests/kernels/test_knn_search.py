import math

import pytest
import torch
from data_needs import need
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memcore
from memcore import data
from memcore.functional import knn_cache, knn_search
from memcore.kernels.knn_search.op import plain
from paths import PATHS, use_path

INF, NAN = math.inf, math.nan
KEYS = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])


def caches(keys):
    """No cache, norms, and norms with a bfloat16 copy where there may be one."""
    yield None
    yield knn_cache(keys)
    if keys.dtype == torch.float32:
        yield knn_cache(keys, bf16=True)


def brute_force(query, keys, k, metric="l2"):
    """Float64 distances by difference, rounded to the accumulation type, sorted by (distance, index), for finite keys."""
    q, n = query.double()[:, None], keys.double()[None]
    if metric == "l2":
        d = (q - n).square().sum(-1)
    elif metric == "ip":
        d = -(q * n).sum(-1)
    else:
        d = 1 - torch.nn.functional.cosine_similarity(q, n, dim=-1, eps=1e-8)
    d = d.to(torch.promote_types(query.dtype, torch.float32))
    d, i = d.sort(dim=-1, stable=True)
    return d[:, :k], i[:, :k]


def check(found, distances, indices):
    assert found[1].tolist() == indices
    torch.testing.assert_close(found[0], torch.tensor(distances), equal_nan=True, rtol=1e-6, atol=0)


def test_values(backend):
    query = torch.tensor([[0.0, 1.0]])
    check(knn_search(query, KEYS, 3), [[1.0, 1.0, 2.0]], [[0, 3, 2]])
    check(knn_search(query, KEYS, 4, metric="ip"), [[-4.0, -2.0, 0.0, 0.0]], [[1, 3, 0, 2]])
    check(knn_search(query, KEYS, 4, metric="cosine"), [[0.0, 0.2, 1.0, 1.0]], [[3, 1, 0, 2]])


def test_lowest_index_wins_a_tie(backend):
    keys = torch.ones(700, 3)
    keys[5] = 0
    for cache in caches(keys):
        check(knn_search(torch.zeros(1, 3), keys, 4, cache=cache), [[0.0, 3.0, 3.0, 3.0]], [[5, 0, 1, 2]])


def test_padding_and_nothing_at_all(backend):
    query = torch.zeros(2, 2)
    check(knn_search(query[:1], KEYS[:1], 3), [[0.0, INF, INF]], [[0, -1, -1]])
    check(knn_search(query, KEYS[:0], 1), [[INF]] * 2, [[-1]] * 2)
    d, i = knn_search(query, KEYS, 0)
    assert d.shape == i.shape == (2, 0) and i.dtype == torch.int64
    check(knn_search(torch.zeros(1, 0), torch.zeros(3, 0), 2), [[0.0, 0.0]], [[0, 1]])


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_a_query_that_is_no_number(backend, metric):
    query = torch.tensor([[NAN, 0.0], [0.0, 1.0], [0.0, INF]])
    for keys in (KEYS, KEYS[:0], KEYS.repeat(100, 1)):
        for cache in caches(keys):
            d, i = knn_search(query, keys, 2, metric=metric, cache=cache)
            assert d[::2].isnan().all() and (i[::2] == -1).all()
            assert not d[1].isnan().any()
    assert knn_search(query, KEYS, 0, metric=metric)[0].shape == (3, 0)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("N", [5, 205])
def test_keys_that_are_no_numbers_come_last(backend, metric, N):
    keys = torch.ones(N, 2)
    keys[0, 1], keys[2, 0], keys[4, 0] = NAN, INF, -INF
    for cache in caches(keys):
        d, i = knn_search(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), keys, N + 1, metric=metric, cache=cache)
        usable = [1, 3, *range(5, N)]
        assert i.tolist() == [[*usable, 0, 2, 4, -1]] * 2
        assert d[:, : N - 3].isfinite().all() and (d[:, N - 3 :] == INF).all()


def test_distances_that_overflow(backend):
    """At +inf with their own index, behind the others; norms that overflow do not matter where the distance does not."""
    keys = torch.tensor([[3e38], [1.0], [-3e38], [2.0]]).repeat(60, 1)
    for cache in caches(keys):
        d, i = knn_search(torch.zeros(1, 1), keys, 122, cache=cache)
        assert i[0, :2].tolist() == [1, 5] and i[0, 60:62].tolist() == [3, 7] and i[0, 120:].tolist() == [0, 2]
        assert d[0, 119] == 4 and d[0, 120] == INF
        check(knn_search(torch.tensor([[3e38]]), keys, 2, cache=cache), [[0.0, 0.0]], [[0, 4]])
        far = torch.stack([keys[:, 0], torch.ones(240)], 1)
        d, i = knn_search(torch.tensor([[1.0, 0.0]]), far, 2, metric="cosine")
        check((d, i), [[0.0, 0.0]], [[0, 4]])
    half = knn_search(torch.zeros(1, 1, dtype=torch.float16), torch.tensor([[300.0], [1.0]], dtype=torch.float16), 2)
    assert half[0].tolist() == [[1.0, INF]] and half[1].tolist() == [[1, 0]]


def test_cosine_of_zero_and_of_next_to_nothing(backend):
    """Similarity 0 to a zero vector; norms below 1e-8 count as 1e-8."""
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e-9, 0.0], [-1.0, 0.0]]).repeat(30, 1)
    d, i = knn_search(torch.tensor([[2.0, 0.0], [0.0, 0.0], [1e-9, 0.0]]), keys, 120, metric="cosine")
    assert i[0].tolist() == [*range(1, 120, 4), *range(2, 120, 4), *range(0, 120, 4), *range(3, 120, 4)]
    torch.testing.assert_close(d[0, ::30], torch.tensor([0.0, 0.9, 1.0, 2.0]))
    assert (d[1] == 1).all() and i[1].tolist() == list(range(120))
    torch.testing.assert_close(d[2, ::30], torch.tensor([0.9, 0.99, 1.0, 1.1]))
    query = torch.tensor([[0.0, 0.0]], requires_grad=True)
    knn_search(query, keys, 3, metric="cosine")[0].sum().backward()
    assert query.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_row_finds_itself_at_distance_zero(backend, metric):
    """Far from the origin, where |q|^2 - 2 q.k + |k|^2 would be off by 0.1."""
    keys = 1000 + torch.randn(600, 20)
    for cache in caches(keys):
        query = keys.clone().requires_grad_()
        d, i = knn_search(query, keys, 2, metric=metric, cache=cache)
        assert i[:, 0].tolist() == list(range(600)) and (d[:, 0] == 0).all()
        assert torch.equal(i, brute_force(keys, keys, 2, metric)[1]) or metric == "cosine"
        (grad,) = torch.autograd.grad(d[:, 0].sum(), query)
        assert (grad == 0).all()


def test_count(backend):
    keys = torch.stack([KEYS, KEYS.flip(0), KEYS])
    keys[0, 2:], keys[1, 3:] = NAN, NAN
    query = torch.zeros(1, 2)
    d, i = knn_search(query, keys, 3, count=torch.tensor([2, 3, -7]))
    assert i.tolist() == [[[0, 1, -1]], [[1, 0, 2]], [[-1, -1, -1]]]
    assert d.tolist() == [[[0.0, 25.0, INF]], [[1.0, 4.0, 25.0]], [[INF, INF, INF]]]
    assert knn_search(query, KEYS, 9, count=torch.tensor(99))[1].tolist() == [[0, 2, 3, 1, -1, -1, -1, -1, -1]]
    assert knn_search(query, KEYS, 2, count=1)[1].tolist() == [[0, -1]]
    with pytest.raises(ValueError, match=r"memcore.knn_search: 'count' must be at most N = 4, got 5"):
        knn_search(query, KEYS, 2, count=5)
    with pytest.raises(ValueError, match=r"memcore.knn_search: 'count' must be at least 0, got -1"):
        knn_search(query, KEYS, 2, count=-1)
    with pytest.raises(TypeError, match="'count' must be an int or an integer tensor, got torch.float32"):
        knn_search(query, KEYS, 2, count=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"'count' must have shape \(A\) = \(3,\) to match 'keys'"):
        knn_search(query, keys, 2, count=torch.tensor([1, 2]))


def test_refusals():
    query = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="memcore.knn_search: 'k' must be at least 0, got -1"):
        knn_search(query, KEYS, -1)
    with pytest.raises(ValueError, match="memcore.knn_search: 'metric' must be 'l2', 'cosine' or 'ip', got 'l1'"):
        knn_search(query, KEYS, 1, metric="l1")
    with pytest.raises(ValueError, match=r"'cache.norms' must have shape \(4,\) to match 'keys' \(4, 2\), got \(3,\)"):
        knn_search(query, KEYS, 1, cache=knn_cache(KEYS[:3]))
    with pytest.raises(TypeError, match="'cache' must be a KnnCache, got Tensor"):
        knn_search(query, KEYS, 1, cache=KEYS)
    with pytest.raises(TypeError, match="memcore.knn_cache: 'keys' must be float32 to have a bfloat16 copy, got torch.float64"):
        knn_cache(KEYS.double(), bf16=True)


def drawn(Q, N, D, seed, kind, dtype):
    """Queries and keys: normal, in clusters, coarse (many ties), coming nearer in their order, or far from the origin."""
    g = torch.Generator().manual_seed(seed)
    query, keys = torch.randn(Q, D, generator=g), torch.randn(N, D, generator=g)
    if kind == "clusters":
        keys = 0.01 * keys + torch.randn(5, D, generator=g)[torch.randint(5, (N,), generator=g)]
        query = torch.cat([query, keys])[:Q]
    elif kind == "coarse":
        query, keys = query.round(), keys.round()
    elif kind == "sorted":
        keys = keys[(keys - query[0]).square().sum(-1).argsort(descending=True)]
    elif kind == "far":
        query, keys = query + 100, keys + 100
    return query.to(dtype), keys.to(dtype)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 130), st.integers(0, 1500), st.sampled_from([1, 2, 3, 8, 17, 64, 100]), st.integers(0, 200), st.integers(0, 2**31),
    st.sampled_from(["normal", "clusters", "coarse", "sorted", "far"]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_against_brute_force(path, metric, Q, N, D, k, seed, kind, dtype):
    """Keys of any order and density; coarse ones have many ties."""
    query, keys = drawn(Q, N, D, seed, kind, dtype)
    wanted, at = brute_force(query, keys, k, metric)
    with use_path(path):
        for cache in caches(keys):
            d, i = knn_search(query, keys, k, metric=metric, cache=cache)
            n = min(k, N)
            assert (i[:, n:] == -1).all() and (d[:, n:] == INF).all()
            if metric == "cosine":  # PyTorch's similarity cancels, so only the distances compare
                torch.testing.assert_close(d[:, :n], wanted.to(dtype), rtol=1e-5 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)
            else:
                torch.testing.assert_close(d[:, :n], wanted.to(dtype), rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=1e-12)
                same = i[:, :n] == at
                assert same.all() or dtype == torch.float64 and torch.equal(wanted[~same], d[:, :n][~same]) or close_ties(wanted, same)


def close_ties(wanted, same):
    """Differences lie within runs of distances that are equal but for the last bit of a float64 sum."""
    step = wanted.diff(dim=-1).abs() <= 3e-7 * wanted[:, 1:].abs()
    run = torch.nn.functional.pad(step, (1, 0)) | torch.nn.functional.pad(step, (0, 1), value=True)
    return bool((same | run).all())


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("D, dtype", [(39, torch.float32), (45, torch.float32), (39, torch.float64)])
@pytest.mark.skipif("native" not in PATHS[-1], reason="the native library is not built")
def test_one_query_and_more_keys_than_caches_hold(D, dtype, metric):
    """More than 16 MiB, as bfloat16 too. Some keys differ from the query in one column each; the other neighbours are hardly nearer than the rest."""
    keys = torch.randn((17 << 20) // ((2 if dtype == torch.float32 else 8) * D), D).to(dtype)
    query = torch.randn(1, D).to(dtype).sign()
    near, k = torch.randperm(len(keys))[:D], D + 200
    keys[near] = query * (1 + torch.diag(torch.linspace(0.1, 0.3, D, dtype=dtype))) * (9 if metric == "ip" else 1)
    wanted, at = brute_force(query, keys, k, metric)
    for path in PATHS[1:]:
        with use_path(path):
            for cache in caches(keys):
                before = torch.ops.memcore._knn_rescans()
                d, i = knn_search(query, keys, k, metric=metric, cache=cache)
                assert torch.ops.memcore._knn_rescans() == before, "the scan did not prove its neighbours"
                assert sorted(i[0, :D].tolist()) == sorted(near.tolist())
                assert torch.equal(i, at) or close_ties(wanted, i == at)
                torch.testing.assert_close(d, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("path", [p for p in PATHS if p.startswith("native")])
def test_scans_prove_their_neighbours(path, dtype, metric):
    """Else every distance is taken anew: right, but slow, so that no other test would see a scan that is wrong."""
    with use_path(path):
        for Q, D in [*((Q, 45) for Q in (1, 2, 3, 5, 8, 20, 130)), *((1, D) for D in range(33, 48))]:  # any rest of the widest vector
            keys, query = torch.randn(5000, D).to(dtype), torch.randn(Q, D).to(dtype)
            for cache in caches(keys):
                before = torch.ops.memcore._knn_rescans()
                knn_search(query, keys, 50, metric=metric, cache=cache)
                assert torch.ops.memcore._knn_rescans() == before, (Q, D, cache and cache.mirror is not None)


def test_any_number_of_threads_and_shards(operators):
    keys, query = torch.randn(60_000, 33), torch.randn(3, 33)
    keys[30_000:] = keys[:30_000]
    expected = None
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for cache in caches(keys):
            found = knn_search(query, keys, 20, cache=cache)
            expected = expected or found
            assert all(torch.equal(a, e) for a, e in zip(found, expected))
    assert expected[1][:, ::2].max() < 30_000 and torch.equal(expected[1][:, ::2] + 30_000, expected[1][:, 1::2])


@pytest.mark.parametrize("shape", [(), (3,)])
def test_sparse_gradients(backend, shape):
    if backend == "registered":
        pytest.skip("row-sparse gradients of a registered operator are the native library's")
    keys, query = torch.randn(*shape, 400, 6), torch.randn(*shape, 5, 6)
    dense, sparse = keys.clone().requires_grad_(), keys.clone().requires_grad_()
    q1, q2 = query.clone().requires_grad_(), query.clone().requires_grad_()
    for k, q, option in ((dense, q1, False), (sparse, q2, True)):
        d, i = knn_search(q, k, 7, sparse=option)
        (d * torch.linspace(-1, 1, 7)).sum().backward()
    assert sparse.grad.is_sparse and sparse.grad._nnz() <= i.numel()
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    torch.testing.assert_close(q2.grad, q1.grad)
    rows = sparse.grad.coalesce().indices()
    used = {(*([a] if shape else []), n) for a, block in enumerate(i if shape else [i]) for n in block.flatten().tolist()}
    assert {tuple(r) for r in rows.T.tolist()} == used
    torch.optim.SGD([sparse], 0.1).step()


def test_sparse_gradients_know_no_padding(backend):
    if backend == "registered":
        pytest.skip("row-sparse gradients of a registered operator are the native library's")
    keys = KEYS.clone().requires_grad_()
    d, _ = knn_search(torch.ones(1, 2), keys, 4, sparse=True, count=2)
    d[:, :2].sum().backward()
    assert keys.grad.coalesce().indices().tolist() == [[0, 1]]
    assert keys.grad.coalesce().values().tolist() == [[-2.0, -2.0], [4.0, 6.0]]


def test_one_graph_for_any_number_of_queries_and_rows(two_backends):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: knn_search(q, k, 3), fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (Q, N, D) in enumerate([(5, 11, 6), (4, 9, 5), (8, 20, 3)]):
        q, k = torch.randn(Q, D), torch.randn(N, D)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            d, at = compiled(q, k)
        assert torch.equal(at, knn_search(q, k, 3)[1])


def test_the_backward_saves_neither_distances_to_all_keys_nor_copies(operators):
    saved = []
    query, keys = torch.randn(8, 4, requires_grad=True), torch.randn(5000, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        knn_search(query, keys, 6)
    own = [t for t in saved if t.data_ptr() not in (query.data_ptr(), keys.data_ptr())]
    assert sum(t.numel() for t in own) <= 2 * 8 * 6


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    m = need(data.mnist)
    flat = [torch.from_numpy(x).reshape(len(x), 784).float() for x in (m.x_train, m.x_test)]
    return *flat, torch.from_numpy(m.y_train), torch.from_numpy(m.y_test)


@pytest.mark.skipif("native" not in PATHS[-1], reason="the native library is not built")
def test_nearest_digit(digits, operators):
    """1-nearest-neighbour error on raw pixels: 3.09 %, the published figure."""
    x, test, label, wanted = digits
    _, i = knn_search(test, x, 1, cache=knn_cache(x))
    assert int((label[i[:, 0]] != wanted).sum()) == 309


@pytest.mark.parametrize("cached", ["none", "norms"])
def test_sift_neighbours(two_backends, cached):
    """Exactly those given, ties by lower index; squared distances are whole numbers."""
    v = need(data.vectors)
    base, query = torch.from_numpy(v.base).float(), torch.from_numpy(v.query).float()
    cache = None if cached == "none" else knn_cache(base)
    d, i = knn_search(query, base, 100, cache=cache)
    assert torch.equal(i, torch.from_numpy(v.neighbors).long())
    assert torch.equal(d, torch.from_numpy(v.sqdist).float())


@pytest.mark.skipif(not PATHS[-1].startswith("native"), reason="needs the native library")
def test_the_registered_operator_refuses_what_does_not_fit(operators):
    """Python's checks are passed over by plain calls: nothing may run past a tensor's end."""
    q, k, v = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9, 2)
    stacked = torch.randn(2, 9, 4)
    count, norms, mirror, rounding = torch.tensor([9]), k.square().sum(-1), k.bfloat16(), torch.tensor(0.01)
    fits = (q, k, count, norms, mirror, rounding, 2, 0)
    torch.ops.memcore.knn_search_fwd(*fits)
    wrong = [
        {0: q[:, :3]}, {0: q[0]}, {0: q.double()}, {0: q[None]}, {0: q[None], 1: stacked}, {1: k[0]}, {1: k.double()}, {2: count.int()}, {2: torch.tensor([3, 9])},
        {3: norms[:8]}, {3: norms.double()}, {3: norms[:, None]}, {4: mirror[:8]}, {4: mirror.half()}, {4: mirror[:, :3]}, {5: rounding.double()}, {5: rounding[None]},
        {6: -1}, {7: 3}, {7: -1},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.memcore.knn_search_fwd(*(change.get(i, x) for i, x in enumerate(fits)))
    for values in (v[:8], v.double(), v[0], v[None]):
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.memcore.knn_lookup_fwd(q, k, values, None, None, None, None, 2, 0, 0, 1e-3)


@pytest.mark.skipif(not PATHS[-1].startswith("native"), reason="needs the native library")
def test_plain_calls_go_to_the_kernel_at_once(operators):
    q, k, v = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9, 2)
    count = torch.tensor([9])
    assert plain("knn_search", q, k, 2, "l2", None, None) and plain("knn_lookup", q, k, 2, "ip", count, knn_cache(k, bf16=True), v)
    meta = torch.empty(3, 4, device="meta")
    for changed in ({0: meta}, {1: [1.0]}, {2: True}, {2: 2.0}, {3: "l1"}, {4: 9}, {4: count.to("meta")}, {5: (None, None, None)}, {6: v.to("meta")}):
        given = (q, k, 2, "l2", count, None, v)
        assert not plain("knn_search", *(changed.get(i, x) for i, x in enumerate(given))), changed
    with use_path("reference"):
        assert not plain("knn_search", q, k, 2, "l2", None, None)
