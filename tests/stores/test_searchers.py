"""Searchers: candidates ranked by true distances, nothing stale; with faiss where it is installed, and with a stand-in of its interface."""

import sys
import types

import numpy as np
import pytest
import torch

from memcore.stores import HNSW, IVF, Exact, Searcher, _optimizers
from memcore.stores.dnd import DND

try:
    import faiss as real
except ImportError:
    real = None


class Index:
    """Finds the nearest of what was added, unless `misses` says so; as stale as an index is."""

    builds = 0
    is_trained = False

    def __init__(self, *args):
        self.metric = args[-1]
        self.cp, self.hnsw = types.SimpleNamespace(), types.SimpleNamespace()

    def train(self, points):
        self.is_trained = True

    def add(self, points):
        Index.builds += 1
        self.points = np.array(points)

    def search(self, query, k):
        with np.errstate(invalid="ignore"):
            d = -query @ self.points.T if self.metric == 0 else ((query[:, None] - self.points) ** 2).sum(-1)
        found = np.argsort(d, 1)[:, :k]
        return None, np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1).astype(np.int64)


@pytest.fixture
def faiss(monkeypatch):
    fake = types.ModuleType("faiss")
    fake.METRIC_L2, fake.METRIC_INNER_PRODUCT = 1, 0
    fake.IndexFlatL2 = fake.IndexFlatIP = lambda D: None
    fake.IndexIVFFlat = fake.IndexHNSWFlat = Index
    Index.builds = 0
    monkeypatch.setitem(sys.modules, "faiss", fake)
    return fake


def histories(make, metric, exactly):
    """Two stores of one history, searched by `make()` and exactly; the part of the neighbours that both find."""
    torch.manual_seed(0)
    settings = {"neighbours": 5, "metric": metric, "kernel": "softmax", "optimizer": "sgd"}
    ours, plain = DND(2, 300, 8, searcher=make(), **settings), DND(2, 300, 8, **settings)
    agree = []

    def compare():
        query = torch.randn(7, 8)
        query[0] = torch.nan
        which = torch.randint(2, (7,))
        for dictionary in (None, which):
            found = [s.lookup(query, dictionary=dictionary) for s in (ours, plain)]
            for s, f in zip((ours, plain), found, strict=True):
                f.output.nan_to_num().sum().backward()
            a, b = found
            agree.append(sum(s in near for mine, near in zip(a.indices.flatten(0, -2).tolist(), b.indices.flatten(0, -2).tolist(), strict=True) for s in mine)
                         / a.indices.numel())
            if exactly:
                assert torch.equal(a.indices, b.indices)
                for x, y in zip(a, b, strict=True):
                    torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours.keys.grad.to_dense(), plain.keys.grad.to_dense(), rtol=1e-3, atol=1e-5)
            ours.zero_grad(), plain.zero_grad()

    for step in range(12):
        keys, values = torch.randn(60, 8), torch.randn(60)
        which = torch.randint(2, (60,))
        hashes = torch.arange(60) + 40 * step if step % 3 else torch.randint(0, 300, (60,))
        for store in (ours, plain):
            store.write(keys, values, hashes, dictionary=which)
            store.delete(torch.arange(step, 300, 17), dictionary=step % 2)
            if step == 7:
                store.clear(1)
            grad = torch.sparse_coo_tensor([[0, 0], [1, 3]], torch.ones(2, 8), store.keys.shape, check_invariants=True)
            store.keys.grad = grad
            store.step(0.7)
        compare()
    return sum(agree) / len(agree)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_exact_as_a_searcher(metric):
    assert isinstance(Exact(), Searcher) and histories(Exact, metric, True) == 1


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("rebuild", [0.0, 0.2, 10.0])
def test_an_index_is_never_stale(faiss, metric, rebuild):
    made = histories(lambda: IVF(rebuild=rebuild, least=20), metric, True)
    assert made == 1 and (Index.builds <= 4 if rebuild == 10 else Index.builds > 4)


def test_rows_that_are_candidates_only_are_not_trained(faiss):
    store = DND(1, 100, 4, neighbours=2, optimizer=_optimizers.Adam(), searcher=IVF(overfetch=10, least=10))
    store.write(torch.randn(100, 4), torch.randn(100))
    found = store.lookup(torch.randn(1, 4))
    found.output.sum().backward()
    assert sorted(store.values.grad.coalesce().indices()[1].tolist()) == sorted(found.indices.flatten().tolist())


@pytest.mark.skipif(real is None, reason="faiss is not installed")
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("make", [lambda: IVF(8, 6, least=20), lambda: HNSW(8, 32, least=20)], ids=["ivf", "hnsw"])
def test_faiss(make, metric):
    assert histories(make, metric, False) >= 0.9
    whole = IVF(4, 4, least=20) if isinstance(make(), IVF) else HNSW(64, 300, overfetch=60, least=20)
    assert histories(lambda: whole, metric, isinstance(whole, IVF)) >= 0.99


def test_errors(faiss, monkeypatch):
    for call, words in (
        (lambda: IVF(probes=0), "memcore.stores.IVF: 'probes' must be at least 1, got 0"),
        (lambda: IVF(overfetch=0), "'overfetch' must be at least 1"),
        (lambda: HNSW(rebuild=-1.0), "memcore.stores.HNSW: 'rebuild' must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'needs .faiss., which is not importable .*pip install "memcore\[faiss-cpu\]"'):
        IVF()


def test_doctor_warns_of_faiss_wheels_that_clash():
    from memcore.doctor import examine, faiss_warnings, text

    assert faiss_warnings([], None) == faiss_warnings(["faiss-cpu"], "12.8") == faiss_warnings(["faiss-gpu-cu12"], "12.8") == []
    (two,) = faiss_warnings(["faiss-cpu", "faiss-gpu-cu12"], "12.8")
    assert two.startswith("faiss-cpu and faiss-gpu-cu12 overwrite each other's module faiss; keep one")
    assert faiss_warnings(["faiss-gpu-cu11"], "12.8") == [
        "faiss-gpu-cu11 is for CUDA 11, torch for CUDA 12.8: two CUDA runtimes in one process; install that of torch's version"
    ]
    assert faiss_warnings(["faiss-gpu-cu12"], None) == ["faiss-gpu-cu12 is for GPUs, and this torch is for CPUs alone"]
    report = examine()
    assert "warning: " + two in text({**report, "warnings": [two]}) and report["slot_table"].startswith(("built", "in Python: memcore's slot table"))
