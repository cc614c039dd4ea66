"""Searches by the bfloat16 copy of the keys: the neighbours of the float32 keys, whatever the CPU multiplies with."""

import math
from pathlib import Path

import pytest
import torch
from cases import CASES
from data_needs import need

import memcore
from memcore import data
from memcore.functional import knn_cache, knn_search
from paths import PATHS, use_path

NATIVE = [p for p in PATHS if p.startswith("native")]
PRODUCTS = ("widened", "pairs", "tiles")  # as csrc/cpu/knn_search.cpp counts them
WAYS = [f"{p}-{most}" for p in NATIVE for most in (PRODUCTS if p.endswith("avx512") else ("widened",))]
METRICS = ["l2", "cosine", "ip"]
FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else ()

if not NATIVE:
    pytest.skip("the native library is not built", allow_module_level=True)


@pytest.fixture(params=WAYS)
def way(request):
    """Every instruction set, the best one with AMX's tiles at most, with AVX512-BF16's pairs, and with neither (all the same, where the CPU has none)."""
    path, _, most = request.param.rpartition("-")
    with use_path(path):
        before = torch.ops.memcore._set_knn_products(PRODUCTS.index(most))
        try:
            yield request.param
        finally:
            torch.ops.memcore._set_knn_products(before)


def same(query, keys, k, cache=None, **options):
    """Asserts equality with the float32 search; how many queries the copy did not settle."""
    before = torch.ops.memcore._knn_rescans()
    found = knn_search(query, keys, k, cache=cache or knn_cache(keys, bf16=True), **options)
    again = torch.ops.memcore._knn_rescans() - before
    wanted = knn_search(query, keys, k, **options)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0].nan_to_num(nan=-math.pi), wanted[0].nan_to_num(nan=-math.pi))
    return again


def reads_copy(way, Q):
    """Whether a search of so many queries reads the copy at all, and not the keys, whose float32 products are as quick as those of the copy widened."""
    if Q < 8:
        return True
    return (way.endswith(("pairs", "tiles")) and "avx512_bf16" in FLAGS) or (way.endswith("tiles") and "amx_bf16" in FLAGS)


def vectors(kind, N, D, Q, seed=0):
    g = torch.Generator().manual_seed(seed)
    query, keys = torch.randn(Q, D, generator=g), torch.randn(N, D, generator=g)
    if kind == "clusters":
        keys = 0.01 * keys + torch.randn(5, D, generator=g)[torch.randint(5, (N,), generator=g)]
        query = keys[:Q] + 1e-3 * query[: len(keys[:Q])]
    elif kind == "duplicates":
        keys = keys[torch.randint(max(1, N // 40), (N,), generator=g)]
    elif kind == "coarse":
        query, keys = query.round(), keys.round()
    elif kind == "far":
        query, keys = query + 30, keys + 30
    elif kind == "nearer and nearer":
        keys = keys[(keys - query[0]).square().sum(-1).argsort(descending=True)]
    elif kind == "tiny":
        query, keys = 1e-18 * query, 1e-18 * keys
    elif kind == "subnormal":  # some numbers, all products
        query, keys = 1e-37 * query, 1e-38 * keys
    elif kind == "no numbers":
        keys[::7, 0], keys[3::11, -1], query[1::5, 0] = math.nan, math.inf, -math.inf
    elif kind == "huge":
        keys[::3] *= 1e18
        keys[1::9] *= 1e25
        keys[4::9] = 3.4e38
        query[::4] *= 1e19
    return query, keys


KINDS = ["normal", "clusters", "duplicates", "coarse", "far", "nearer and nearer", "tiny", "subnormal", "no numbers", "huge"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_neighbours(way, metric, kind):
    """All numbers of queries and widths that leave rests in tiles, vectors and groups of rows."""
    sizes = [(65, 1, 1, 5), (300, 2, 3, 50), (777, 31, 17, 10), (1000, 32, 33, 50), (2085, 33, 9, 1), (1999, 64, 130, 50), (900, 100, 40, 900)]
    alone = [(1000, D, 1, 40) for D in (2, 31, 32, 34, 63, 100, 128)] + [(3000, 784, 1, 50), (4100, 400, 1, 1)]  # one query has tiles of its own
    for N, D, Q, k in sizes + alone:
        query, keys = vectors(kind, N, D, Q)
        same(query, keys, k, metric=metric)
        same(query, keys, k, metric=metric)  # the other way round


@pytest.mark.parametrize("metric", METRICS)
def test_ties_that_rounding_hides(way, metric):
    """5,000 keys whose distances differ by less than a bfloat16's error, in any order; 300 of them differ by nothing."""
    g = torch.Generator().manual_seed(1)
    centre, around = torch.randn(48, generator=g), torch.nn.functional.normalize(torch.randn(5000, 48, generator=g), dim=-1)
    keys = 3 * centre + around * (1 + 1e-5 * torch.randperm(5000, generator=g))[:, None]
    keys[100:400] = keys[100]
    query = 3 * centre + 1e-3 * torch.randn(20, 48, generator=g)
    for Q in (2, 20):
        again = same(query[:Q], keys, 50, metric=metric)
        assert again > 0 or metric == "ip" or not reads_copy(way, Q)


@pytest.mark.parametrize("metric", METRICS)
def test_what_the_copy_proves_is_not_searched_again(way, metric):
    query, keys = vectors("normal", 20_000, 64, 64)
    for Q in (1, 7, 64):
        assert same(query[:Q], keys, 50, metric=metric) <= (0 if metric == "l2" else 2)


def test_every_row_is_scanned(way):
    """Each row in turn is the nearest, wherever it lies in groups of rows, blocks and shards."""
    query, keys = vectors("normal", 1300, 40, 1)
    keys = 5 + keys.abs()
    for Q in (2, 40):
        for first in range(0, len(keys), Q):
            query = keys[first : first + Q] + 1e-3
            cache = knn_cache(keys, bf16=True)
            assert knn_search(query, keys, 1, cache=cache)[1][:, 0].tolist() == list(range(first, min(first + Q, len(keys))))


@pytest.mark.parametrize("metric", METRICS)
def test_dictionaries_counts_and_threads(way, metric):
    query, keys = vectors("clusters", 3000, 40, 30)
    stacked = torch.stack([keys, keys.flip(0), 2 * keys])
    cache = knn_cache(stacked, bf16=True)
    count = torch.tensor([3000, 1501, 70])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for asked in (query, query[:3], query.expand(3, -1, -1) + torch.arange(3)[:, None, None]):
            same(asked.contiguous(), stacked, 20, cache, metric=metric, count=count)
    keys = torch.randn(60_000, 33)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        same(keys[:3] + 0.1, keys, 20, metric=metric)


def test_without_norms_and_rounding(way):
    query, keys = vectors("normal", 2000, 40, 20)
    cache = knn_cache(keys, bf16=True)
    for Q in (2, 20):
        same(query[:Q], keys, 9, cache._replace(norms=None, rounding=None))


def test_rounding_bounds_the_copy():
    for kind in KINDS:
        _, keys = vectors(kind, 500, 9, 5)
        cache = knn_cache(keys, bf16=True)
        assert cache.mirror.dtype == torch.bfloat16 and torch.equal(cache.mirror.float().nan_to_num(), keys.bfloat16().float().nan_to_num())
        exact, copy = keys.double(), cache.mirror.double()
        usable = copy.isfinite().all(-1)
        assert ((copy - exact).norm(dim=-1) <= cache.rounding.double() * exact.norm(dim=-1))[usable].all()
        assert cache.rounding < 2**-8 or kind == "subnormal"  # whose errors are below what the certificate allows for in any case


@pytest.mark.parametrize("name", ["knn_search", "knn_lookup"])
def test_contract_cases_with_a_copy(way, name):
    """Outputs and gradients of the contract's samples do not depend on the cache."""
    case = next(c for c in CASES if c.name == name)
    function = getattr(memcore.functional, name)
    for sample in case.samples:
        inputs = {n: t.float() for n, t in case.inputs(sample).items()}
        results = []
        for cache in (None, knn_cache(inputs["keys"], bf16=True)):
            leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
            found = function(**leaves, **sample.options, cache=cache)
            numbers = [t.nan_to_num(0, 0, 0).flatten() for t in found if t.is_floating_point()]
            loss = sum((t * torch.linspace(-1, 1, t.numel())).sum() for t in numbers)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            results.append([*found, *(g for g in grads if g is not None)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.nan_to_num(nan=-math.pi), b.nan_to_num(nan=-math.pi)), sample


def test_a_store_with_a_copy_finds_what_one_without_finds(way):
    """Written, overwritten, trained, deleted."""
    g = torch.Generator().manual_seed(5)
    stores = [memcore.DND(2, 300, 24, neighbours=9, bf16=bf16) for bf16 in (True, False)]
    for turn in range(4):
        keys, values, query = torch.randn(120, 24, generator=g), torch.randn(120, 1, generator=g), torch.randn(12, 24, generator=g)
        query[::3] = keys[::30] + 0.01
        found = []
        for store in stores:
            for a in range(2):
                store.write(keys, values, torch.arange(120) + 70 * turn, dictionary=a)
            store.delete(torch.arange(5) + 70 * turn, dictionary=1)
            found.append(store.lookup(query))
            found[-1].output.square().sum().backward()
            store.step(0.1)
            found.append(store.lookup(query[:2]))
        for a, b in zip(found[:2], found[2:], strict=True):
            assert torch.equal(a.indices, b.indices) and torch.equal(a.distances, b.distances) and torch.equal(a.output, b.output)
    assert torch.equal(stores[0]._rings.mirror, stores[0].keys.detach().bfloat16())


# Real data ------------------------------------------------------------------------------------------------------------


def test_nearest_digit(operators):
    """1-nearest-neighbour error on raw pixels: 3.09 %, the published figure."""
    m = need(data.mnist)
    x, test = (torch.from_numpy(t).reshape(len(t), 784).float() for t in (m.x_train, m.x_test))
    before = torch.ops.memcore._knn_rescans()
    _, i = knn_search(test, x, 1, cache=knn_cache(x, bf16=True))
    assert int((torch.from_numpy(m.y_train)[i[:, 0]] != torch.from_numpy(m.y_test)).sum()) == 309
    assert torch.ops.memcore._knn_rescans() - before <= 100


def test_sift_neighbours(way):
    """Exactly those given, ties by lower index; squared distances are whole numbers."""
    v = need(data.vectors)
    base, query = torch.from_numpy(v.base).float(), torch.from_numpy(v.query).float()
    cache = knn_cache(base, bf16=True)
    for some in (slice(0, 100), slice(3, 5)):
        d, i = knn_search(query[some], base, 100, cache=cache)
        assert torch.equal(i, torch.from_numpy(v.neighbors).long()[some])
        assert torch.equal(d, torch.from_numpy(v.sqdist).float()[some])
