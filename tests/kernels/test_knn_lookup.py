import math

import pytest
import torch

import memcore
from memcore.functional import knn_cache, knn_lookup

INF, NAN = math.inf, math.nan
KEYS, VALUES = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.0, 10.0], [3.0, 20.0], [9.0, 30.0]])


def close(a, e):
    torch.testing.assert_close(a, torch.tensor(e), rtol=1e-6, atol=1e-7, equal_nan=True)


def test_values(backend):
    """At 0.25: distances 1/16, 9/16; kernels 1 / (1/16 + 1/16) = 8 and 1 / (9/16 + 1/16) = 1.6."""
    found = knn_lookup(torch.tensor([[0.25]]), KEYS, VALUES, 2, delta=0.0625)
    close(found.distances, [[0.0625, 0.5625]])
    assert found.indices.tolist() == [[0, 1]]
    close(found.weights, [[8 / 9.6, 1.6 / 9.6]])
    close(found.output, [[(8 * 1 + 1.6 * 3) / 9.6, (8 * 10 + 1.6 * 20) / 9.6]])
    soft = knn_lookup(torch.tensor([[0.25]]), KEYS, VALUES, 2, kernel="softmax", delta=0.5)
    w = 1 / (1 + math.exp(-1))
    close(soft.weights, [[w, 1 - w]])
    close(knn_lookup(torch.tensor([[0.25]]), KEYS, VALUES, 2, kernel="uniform", delta=-1).output, [[2.0, 15.0]])


def test_gradients_of_the_paper(backend):
    """do/dv_i = w_i, do/dq = -sum_i 2 w_i k_i (v_i - o)(q - h_i), do/dh_i = 2 w_i k_i (v_i - o)(q - h_i); 0 at the exact hit."""
    q = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    keys = torch.tensor([[1.0, 2.0], [0.0, 2.0], [1.0, 4.0], [9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([[1.0], [2.0], [-3.0], [7.0]], dtype=torch.float64, requires_grad=True)
    out = knn_lookup(q, keys, values, 3, delta=0.5).output
    k = 1 / torch.tensor([0.5, 1.5, 4.5], dtype=torch.float64)
    w = k / k.sum()
    o = (w * values.detach()[:3, 0]).sum()
    torch.testing.assert_close(out[0, 0].detach(), o)
    dq, dkeys, dvalues = torch.autograd.grad(out.sum(), (q, keys, values))
    rows = (2 * w * k * (values.detach()[:3, 0] - o))[:, None] * (q.detach() - keys.detach()[:3])
    torch.testing.assert_close(dkeys[:3], rows)
    assert (dkeys[0] == 0).all() and (dkeys[3] == 0).all() and dvalues[3] == 0
    torch.testing.assert_close(dq[0], -rows.sum(0))
    torch.testing.assert_close(dvalues[:3, 0], w)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("kernel", ["inverse_distance", "softmax"])
def test_gradcheck_with_an_exact_hit(backend, metric, kernel):
    g = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    query = torch.stack([keys[:, 4], keys[:, 1] + 0.1], 1)
    values = torch.randn(2, 6, 2, generator=g, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (query, keys, values)]

    def f(q, k, v):
        found = knn_lookup(q, k, v, 3, kernel=kernel, delta=0.3, metric=metric)
        return found.output, found.weights, found.distances

    assert (f(*leaves)[2][:, 0, 0] == 0).all()
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("kernel", ["inverse_distance", "softmax", "uniform"])
def test_edges(backend, kernel):
    def look(query, keys, values, k, **options):
        leaves = [torch.tensor(t).requires_grad_() for t in (query, keys, values)]
        found = knn_lookup(*leaves, k, kernel=kernel, **options)
        grads = torch.autograd.grad(found.output.sum() + found.weights.sum(), leaves, allow_unused=True, materialize_grads=True)
        assert all(g.isfinite().all() for g in grads), grads
        return found

    # fewer rows than k, none at all, k = 0
    found = look([[0.0]], [[0.0]], [[4.0]], 3)
    assert found.output.tolist() == [[4.0]] and found.weights.tolist() == [[1.0, 0.0, 0.0]] and found.indices.tolist() == [[0, -1, -1]]
    found = look([[0.0]], [[1.0], [2.0]], [[4.0], [5.0]], 2, count=0)
    assert found.output.tolist() == [[0.0]] and found.weights.tolist() == [[0.0, 0.0]] and found.distances.tolist() == [[INF, INF]]
    found = look([[0.0]], [[1.0]], [[4.0]], 0)
    assert found.output.tolist() == [[0.0]] and found.weights.shape == (1, 0)
    # keys that are no numbers, or whose distance overflows: weight 0, and their values, whatever they hold, do not count
    found = look([[0.0]], [[NAN], [1.0], [3e30]], [[NAN], [5.0], [INF]], 3)
    assert found.output.tolist() == [[5.0]] and found.weights.tolist() == [[1.0, 0.0, 0.0]] and found.indices.tolist() == [[1, 0, 2]]
    found = look([[0.0]], [[NAN], [3e30]], [[1.0], [5.0]], 2)
    assert found.output.tolist() == [[0.0]] and found.weights.tolist() == [[0.0, 0.0]] and found.indices.tolist() == [[0, 1]]
    # a query that is no number
    found = look([[NAN], [0.0]], [[0.0]], [[4.0]], 1)
    assert found.output.isnan().tolist() == [[True], [False]] and found.indices.tolist() == [[-1], [0]]
    assert found.weights.isnan().tolist() == found.distances.isnan().tolist() == [[True], [False]]


@pytest.mark.parametrize("kernel", ["inverse_distance", "softmax"])
@pytest.mark.parametrize("delta", [1e-300, 1e-30, 1e30])
def test_any_width_of_the_kernel(backend, kernel, delta):
    """An exact hit has finite weight; far from all keys the nearest still count."""
    found = knn_lookup(torch.tensor([[0.0], [1e15]]), torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]]), 2, kernel=kernel, delta=delta)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2))
    close(found.output[0], [2.0 if delta < 1 else 3.0])
    assert found.output[1].isfinite().all()


def test_all_dictionaries_in_one_call(backend):
    keys, values, query = torch.randn(4, 90, 5), torch.randn(4, 90, 3), torch.randn(4, 6, 5)
    count = torch.tensor([90, 40, 0, 3])
    together = knn_lookup(query, keys, values, 5, count=count)
    shared = knn_lookup(query[0], keys, values, 5, count=count)
    for a, n in enumerate(count.tolist()):
        for q, found in ((query[a], together), (query[0], shared)):
            alone = knn_lookup(q, keys[a, :n], values[a, :n], 5)
            for x, y in zip(found, alone):
                assert torch.equal(x[a], y)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_sparse_gradients(backend, shape):
    if backend == "registered":
        pytest.skip("row-sparse gradients of a registered operator are the native library's")
    made = torch.randn(*shape, 5, 6), torch.randn(*shape, 400, 6), torch.randn(*shape, 400, 2)
    results = []
    for sparse in (False, True):
        leaves = [t.clone().requires_grad_() for t in made]
        found = knn_lookup(*leaves, 7, delta=0.1, sparse=sparse)
        (found.output.sin().sum() + found.weights[..., 0].sum() + (found.distances * torch.linspace(-1, 1, 7)).sum()).backward()
        results.append([t.grad for t in leaves])
    for dense, sparse in zip(*results):
        torch.testing.assert_close(sparse.to_dense() if sparse.is_sparse else sparse, dense)
    assert results[1][1].is_sparse and results[1][2].is_sparse and results[1][1]._nnz() <= found.indices.numel()
    cache = knn_cache(made[1])
    assert not knn_lookup(*made, 7, sparse=True, cache=cache).output.requires_grad


def test_refusals():
    q = torch.zeros(1, 1)
    for delta in (0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="memcore.knn_lookup: 'delta' must be"):
            knn_lookup(q, KEYS, VALUES, 1, delta=delta)
    with pytest.raises(ValueError, match="'kernel' must be 'softmax' or 'uniform' with metric 'ip'"):
        knn_lookup(q, KEYS, VALUES, 1, metric="ip")
    with pytest.raises(ValueError, match="'kernel' must be 'inverse_distance', 'softmax' or 'uniform', got 'box'"):
        knn_lookup(q, KEYS, VALUES, 1, kernel="box")
    with pytest.raises(ValueError, match=r"'values' must have shape \(N, V\) = \(3, 2\) to match 'keys' \(3, 1\), got \(2, 2\)"):
        knn_lookup(q, KEYS, VALUES[:2], 1)


def test_the_backward_does_not_grow_with_the_dictionary(operators):
    """Row-sparse gradients of a dictionary of which only pages that are read exist."""
    if operators == "registered":
        pytest.skip("row-sparse gradients of a registered operator are the native library's")
    torch.utils.deterministic.fill_uninitialized_memory = False
    keys = torch.zeros(200_000, 8)
    keys[:, 0] = torch.arange(200_000)
    values = torch.ones(200_000, 1)
    query = torch.full((2, 8), 7.2, requires_grad=True)
    keys.requires_grad_(), values.requires_grad_()
    found = knn_lookup(query, keys, values, 3, sparse=True)
    found.output.sum().backward()
    assert keys.grad._nnz() == values.grad._nnz() == 3
    assert keys.grad._indices().tolist() == [[6, 7, 8]]


def test_mixed_backends_agree_on_neighbours(operators):
    keys, query, values = torch.randn(3000, 24), torch.randn(20, 24), torch.randn(3000, 1)
    found = knn_lookup(query, keys, values, 50)
    with memcore.backend("reference"):
        wanted = knn_lookup(query, keys, values, 50)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.distances, wanted.distances)
    torch.testing.assert_close(found.output, wanted.output)


@pytest.mark.parametrize("sparse", [False, True])
def test_no_dictionaries(backend, sparse):
    """Queries that ask all of none get nothing, and zeros for a gradient."""
    if backend == "registered" and sparse:
        pytest.skip("the native library has the operator of row-sparse gradients")
    query, keys, values = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3), (0, 5, 3), (0, 5, 1)))
    found = knn_lookup(query, keys, values, 2, sparse=sparse)
    assert found.output.shape == (0, 2, 1)
    dquery, dkeys, dvalues = torch.autograd.grad(found.output.sum(), (query, keys, values))
    assert not dquery.any() and dkeys.shape == keys.shape and dvalues.shape == values.shape
