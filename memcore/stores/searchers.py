"""What finds a store's candidates: every key compared, or an approximate index of faiss."""

import math
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import _checks
from .._extras import require
from ..functional import knn_search

if TYPE_CHECKING:
    from .dnd import DND

__all__ = ["HNSW", "IVF", "Exact", "Searcher"]


@runtime_checkable
class Searcher(Protocol):
    """Finds candidates for the nearest entries. The store ranks them by their true distances, so that a searcher may return too many, and
    distances, weights and gradients of those it finds are exact."""

    def attach(self, store: "DND") -> None:
        """Called once, by the store it is given to."""

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """[A, Q, C] distinct slots for query [Q, D] or [A, Q, D], -1 where there is none; C may differ from k. Queries with NaN find nothing."""

    def changed(self, rows: Tensor) -> None:
        """Entries of rows a * N + slot were written, trained, moved or removed."""


class Exact:
    """Compares with every key. `DND(searcher=None)` finds the same in one operator with the read."""

    def attach(self, store: "DND") -> None:
        self.store = store

    @torch.no_grad()
    def candidates(self, query: Tensor, k: int) -> Tensor:
        r = self.store._rings
        return knn_search(query, r.keys, k, metric=self.store.metric, count=r.count, cache=self.store._cache)[1]

    def changed(self, rows: Tensor) -> None:
        pass


class _Faiss:
    """An index of the keys as they were when it was built, beside an exact search of the rows changed since then.

    What was written is found at once, what was removed or changed never by its old key: only what lies in the index is found approximately.
    It is built anew when more than `rebuild` of a dictionary's entries have changed, at the next lookup; below `least` entries all are compared.
    """

    def __init__(self, overfetch: int, rebuild: float, least: int, extra: str) -> None:
        name = f"stores.{type(self).__name__}"
        _checks.whole(name, "overfetch", overfetch, 1)
        _checks.whole(name, "least", least, 1)
        _checks.finite_number(name, "rebuild", rebuild)
        if rebuild < 0:
            raise ValueError(f"memcore.{name}: 'rebuild' must be at least 0, got {rebuild}")
        self.faiss = require("faiss", extra=extra)
        self.overfetch, self.rebuild, self.least = overfetch, rebuild, least

    def attach(self, store: "DND") -> None:
        self.store, self.exact = store, Exact()
        self.exact.attach(store)
        if store.device.type == "cuda":
            self._resources = self._on_gpu()
            require("faiss.contrib.torch_utils", extra="faiss-gpu")  # indexes take tensors where they are
        self._index: list[Any] = [None] * store.dictionaries
        self._recent: list[set[int]] = [set() for _ in range(store.dictionaries)]  # slots changed since their index was built

    def _on_gpu(self) -> Any:
        if not hasattr(self.faiss, "StandardGpuResources"):
            raise ImportError('memcore: searching on a GPU needs a faiss with GPU support; install it with: pip install "memcore[faiss-gpu]"')
        return self.faiss.StandardGpuResources()

    def _new(self, n: int, metric: int) -> Any:
        raise NotImplementedError

    def changed(self, rows: Tensor) -> None:
        N = self.store.capacity
        for row in rows.tolist():
            self._recent[row // N].add(row % N)

    def _points(self, t: Tensor) -> Any:
        """As the index takes them: float32, of length 1 for cosine."""
        t = t.detach().float()
        if self.store.metric == "cosine":
            t = torch.nn.functional.normalize(t, dim=-1)
        return t.contiguous() if t.device.type == "cuda" else t.contiguous().numpy()

    def _build(self, a: int, n: int) -> None:
        faiss, store = self.faiss, self.store
        index = self._new(n, faiss.METRIC_L2 if store.metric == "l2" else faiss.METRIC_INNER_PRODUCT)
        if store.device.type == "cuda":
            index = faiss.index_cpu_to_gpu(self._resources, store.device.index or 0, index)
        points = self._points(store.keys[a, :n])
        if not index.is_trained:
            index.train(points)
        index.add(points)
        self._index[a], self._recent[a] = index, set()

    @torch.no_grad()
    def candidates(self, query: Tensor, k: int) -> Tensor:
        store = self.store
        each = query if query.dim() == 3 else query.expand(store.dictionaries, *query.shape)
        with store._lock:  # the index must be of whole rows
            found = [self._of_one(a, each[a], k) for a in range(store.dictionaries)]
        widest = max(t.shape[1] for t in found)
        return torch.stack([torch.nn.functional.pad(t, (0, widest - t.shape[1]), value=-1) for t in found])

    def _of_one(self, a: int, query: Tensor, k: int) -> Tensor:
        r, metric = self.store._rings, self.store.metric
        n = self.store.counts[a]
        if n < self.least or k == 0 or not len(query):
            return knn_search(query, r.keys[a, :n], k, metric=metric)[1]
        if self._index[a] is None or len(self._recent[a]) > self.rebuild * n:
            self._build(a, n)
        fetched = self._index[a].search(self._points(query), min(n, k * self.overfetch))[1]
        slots = fetched if isinstance(fetched, Tensor) else torch.from_numpy(fetched)
        recent = torch.tensor(sorted(s for s in self._recent[a] if s < n), dtype=torch.int64, device=query.device)
        known = ~torch.isin(slots, recent) & (slots < n) & query.isfinite().all(-1, keepdim=True)
        new = knn_search(query, r.keys[a][recent], k, metric=metric)[1]
        new = torch.where(new < 0, -1, recent[new.clamp_min(0)]) if len(recent) else new
        return torch.cat([torch.where(known, slots, -1), new], -1)


class IVF(_Faiss):
    """faiss's IndexIVFFlat: keys in cells around centroids, of which a query visits the nearest. Also on GPUs.

    Args:
        cells: by default 4 sqrt(n).
        probes: cells a query visits.
        overfetch: candidates for each neighbour wanted, ranked by true distances afterwards.
        rebuild: part of the entries that may have changed before the index is built anew.
        least: with fewer entries, all are compared.

    Raises:
        ImportError: faiss is not installed. ValueError: a number out of range.
    """

    def __init__(
        self, cells: int | None = None, probes: int = 16, *, overfetch: int = 2, rebuild: float = 0.1, least: int = 4096, extra: str = "faiss-cpu"
    ) -> None:
        super().__init__(overfetch, rebuild, least, extra)
        _checks.whole("stores.IVF", "probes", probes, 1)
        if cells is not None:
            _checks.whole("stores.IVF", "cells", cells, 1)
        self.cells, self.probes = cells, probes

    def _new(self, n: int, metric: int) -> Any:
        D, cells = self.store.key_width, min(n, self.cells or math.ceil(4 * math.sqrt(n)))
        quantizer = self.faiss.IndexFlatL2(D) if metric == self.faiss.METRIC_L2 else self.faiss.IndexFlatIP(D)
        index = self.faiss.IndexIVFFlat(quantizer, D, cells, metric)
        index.cp.min_points_per_centroid = 1  # no warning of few points
        index.nprobe = min(cells, self.probes)
        return index


class HNSW(_Faiss):
    """faiss's IndexHNSWFlat, a graph of near keys. On the CPU.

    Args:
        neighbours: edges of a key.
        ef_search: candidates a search keeps, at least those fetched.
        overfetch, rebuild, least: as of `IVF`.

    Raises:
        ImportError: faiss is not installed. ValueError: a number out of range, or a store on a GPU.
    """

    def __init__(self, neighbours: int = 32, ef_search: int = 128, *, overfetch: int = 2, rebuild: float = 0.1, least: int = 4096) -> None:
        super().__init__(overfetch, rebuild, least, "faiss-cpu")
        _checks.whole("stores.HNSW", "neighbours", neighbours, 2)
        _checks.whole("stores.HNSW", "ef_search", ef_search, 1)
        self.neighbours, self.ef_search = neighbours, ef_search

    def _on_gpu(self) -> Any:
        raise ValueError("memcore.stores.HNSW: a store on a GPU must have the searcher IVF, as faiss searches no HNSW there")

    def _new(self, n: int, metric: int) -> Any:
        index = self.faiss.IndexHNSWFlat(self.store.key_width, self.neighbours, metric)
        index.hnsw.efSearch = max(self.ef_search, self.overfetch * self.store.neighbours)
        return index
