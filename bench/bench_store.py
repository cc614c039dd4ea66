"""The suite `store`: memcore.DND's lookup, write and both, against a ring in plain PyTorch and faiss, as N grows; and beside approximate indices."""

import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from .. import stores
from . import measure
from .runner import Run

__all__ = ["store"]

D, K, BATCH = 64, 50, 32
SIZES, QUICK = (10_000, 100_000, 500_000), (1_000,)
WRITE_US, PAIR, OF_FAISS, GROWS = 3.0, 1.05, 0.6, 1.5  # gates; a write must not cost GROWS times as much at the largest size as at the least
COPY = ", bf16 copy"
BUILT = 100_000  # entries that an approximate index is built for: with more that takes minutes
RECALL, ASKED = 0.95, 200  # an index searches as widely as finds this share of the K nearest of so many queries
Calls = dict[str, Callable[[], object]]


def _rounds(*columns: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The next entry, or batch of entries, of a fixed supply."""
    return itertools.cycle(list(zip(*(c.split(1) if c.shape[0] == 256 else c for c in columns), strict=True))).__next__


def _memcore(keys: torch.Tensor, values: torch.Tensor, one: Callable, many: Callable, query: torch.Tensor, bf16: bool = False) -> Calls:
    ring = stores.DND(1, len(keys), D, neighbours=K, bf16=bf16)
    ring.write(keys, values)

    def pair() -> None:
        ring.lookup(query)
        ring.write(*one(), dictionary=0)

    return {
        "lookup": lambda: ring.lookup(query), "write": lambda: ring.write(*one(), dictionary=0),
        f"write of {BATCH}": lambda: ring.write(*many(), dictionary=0), "lookup + write": pair,
    }  # fmt: skip


def _eager(keys: torch.Tensor, values: torch.Tensor, one: Callable, query: torch.Tensor) -> Calls:
    """A ring overwritten in turn: cached norms, addmm, topk, the winners by difference."""
    keys, values, norms = keys.clone(), values.clone(), keys.square().sum(1)
    slot = itertools.cycle(range(len(keys))).__next__

    def lookup() -> torch.Tensor:
        found = torch.addmm(norms, query, keys.T, alpha=-2).topk(K, largest=False, sorted=True).indices
        weights = 1 / ((query[:, None] - keys[found]).square().sum(-1) + 1e-3)
        return (weights[..., None] / weights.sum(-1)[..., None, None] * values[found]).sum(1)

    def write() -> None:
        key, value = one()
        at = slot()
        keys[at], values[at], norms[at] = key[0], value[0], key.square().sum()

    return {"lookup": lookup, "write": write, "lookup + write": lambda: (lookup(), write())}


def _faiss(keys: torch.Tensor, one: Callable, query: torch.Tensor) -> Calls:
    """IndexFlatL2 with its oldest entry removed for each that is added; the search alone, without the read."""
    import faiss

    index, asked, oldest = faiss.IndexFlatL2(D), query.numpy(), np.zeros(1, np.int64)
    index.add(keys.numpy())

    def write() -> None:
        index.remove_ids(oldest)
        index.add(one()[0].numpy())

    return {"lookup": lambda: index.search(asked, K), "write": write, "lookup + write": lambda: (index.search(asked, K), write())}


class _Index:
    """An approximate index whose oldest entry leaves for each that comes. `width` is how widely it searches."""

    def __init__(self, keys: np.ndarray):
        self.next = len(keys)

    def _turn(self) -> tuple[int, int]:
        """Identities of the entry that leaves and of the one that comes."""
        self.next += 1
        return self.next - 1 - self.size, self.next - 1


class _Hnswlib(_Index):
    name, module = "hnswlib", "hnswlib"

    def __init__(self, keys: np.ndarray):
        import hnswlib

        super().__init__(keys)
        self.size, self.index = len(keys), hnswlib.Index("l2", keys.shape[1])
        self.index.init_index(len(keys), M=16, ef_construction=100, allow_replace_deleted=True)
        self.index.set_num_threads(1)
        self.index.add_items(keys, np.arange(len(keys)))

    def width(self, n: int) -> None:
        self.index.set_ef(n)

    def search(self, queries: np.ndarray) -> np.ndarray:
        return self.index.knn_query(queries, K)[0]

    def write(self, key: np.ndarray) -> None:
        oldest, newest = self._turn()
        self.index.mark_deleted(oldest)
        self.index.add_items(key, [newest], replace_deleted=True)


class _Usearch(_Index):
    name, module = "usearch", "usearch"

    def __init__(self, keys: np.ndarray):
        from usearch.index import Index

        super().__init__(keys)
        self.size, self.index = len(keys), Index(ndim=keys.shape[1], metric="l2sq", dtype="f32", connectivity=16, expansion_add=100)
        self.index.add(np.arange(len(keys)), keys, threads=1)

    def width(self, n: int) -> None:
        self.index.expansion_search = n

    def search(self, queries: np.ndarray) -> np.ndarray:
        return self.index.search(queries, K, threads=1).keys.reshape(len(queries), K)

    def write(self, key: np.ndarray) -> None:
        oldest, newest = self._turn()
        self.index.remove(oldest)
        self.index.add(newest, key[0], threads=1)


class _Ivf(_Index):
    name, module = "faiss IVF", "faiss"

    def __init__(self, keys: np.ndarray):
        import faiss

        super().__init__(keys)
        faiss.omp_set_num_threads(1)
        self.size, self.coarse = len(keys), faiss.IndexFlatL2(keys.shape[1])
        self.index = faiss.IndexIVFFlat(self.coarse, keys.shape[1], 4 * int(len(keys) ** 0.5))
        self.index.set_direct_map_type(faiss.DirectMap.Hashtable)  # without it a removal looks at every entry
        self.index.train(keys)
        self.index.add_with_ids(keys, np.arange(len(keys)))

    def width(self, n: int) -> None:
        self.index.nprobe = n // 8

    def search(self, queries: np.ndarray) -> np.ndarray:
        return self.index.search(queries, K)[1]

    def write(self, key: np.ndarray) -> None:
        oldest, newest = self._turn()
        self.index.remove_ids(np.array([oldest]))
        self.index.add_with_ids(key, np.array([newest]))


def _indices(run: Run, keys: torch.Tensor) -> Iterator[tuple[_Index, float]]:
    """Each approximate index that is installed, searching as widely as it must, and its recall."""
    g = torch.Generator().manual_seed(run.seed + 1)
    queries = torch.randn(ASKED, D, generator=g)
    nearest = torch.cdist(queries.double(), keys.double()).topk(K, largest=False).indices.numpy()
    for kind in (_Hnswlib, _Usearch, _Ivf):
        if not find_spec(kind.module):
            run.tell_once(f"store: {kind.module} is not installed, left out")
            continue
        run.say(f"store: building {kind.name} of {len(keys):,} entries")
        index: Any = kind(keys.numpy())
        for exponent in range(6, 13):
            index.width(2**exponent)
            found = index.search(queries.numpy())
            recall = float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, nearest, strict=True)])) / K
            if recall >= RECALL:
                break
        yield index, recall


def _approximate(run: Run, keys: torch.Tensor, ours: dict[str, Calls], one: Callable, query: torch.Tensor) -> None:
    """Exact lookups of ours beside approximate indices that find most of the neighbours."""
    recall, calls = {}, {(op, name): call for name, of in ours.items() for op, call in of.items()}
    for index, share in _indices(run, keys):
        recall[index.name] = share
        lookup, write = (lambda i=index: i.search(query.numpy())), (lambda i=index: i.write(one()[0].numpy()))
        pair = lambda a=lookup, b=write: (a(), b())
        calls |= {("lookup", index.name): lookup, ("write", index.name): write, ("lookup + write", index.name): pair}
    if not recall:
        return
    with measure.threads(1), torch.no_grad():
        timings = run.time(calls, 1, 12)
    for op in ("lookup", "write", "lookup + write"):
        shown = {name: t for (of, name), t in timings.items() if of == op}
        found = recall if op != "write" else {}
        run.add("approximate", op, f"(N={len(keys)},D={D},K={K})", "a call", 1, shown, recall=found)


def store(run: Run) -> None:
    """Every variant at every size in the same rounds, one thread, Q = 1."""
    ours: dict[tuple[str, int], dict] = {}
    sizes = QUICK if run.quick else SIZES
    for N in sizes:
        g = torch.Generator().manual_seed(run.seed)
        keys, values, query = torch.randn(N, D, generator=g), torch.randn(N, 1, generator=g), torch.randn(1, D, generator=g)
        one = _rounds(torch.randn(256, D, generator=g), torch.randn(256, 1, generator=g))
        many = _rounds(torch.randn(64, BATCH, D, generator=g), torch.randn(64, BATCH, 1, generator=g))
        variants = {
            "memcore": _memcore(keys, values, one, many, query),
            f"memcore{COPY}": _memcore(keys, values, one, many, query, bf16=True),
            "eager": _eager(keys, values, one, query),
        }
        try:
            import faiss
        except ImportError:
            run.tell_once("store: faiss is not installed, left out")
        else:
            faiss.omp_set_num_threads(1)
            variants["faiss"] = _faiss(keys, one, query)
        with measure.threads(1), torch.no_grad():
            calls = {(op, name): call for name, of in variants.items() for op, call in of.items()}
            timings = run.time(calls, 1, 12)
        for copy, op in itertools.product(("", COPY), variants["memcore"]):
            steps = BATCH if op.endswith(str(BATCH)) else 1
            shown = {name: timings[op, f"memcore{copy}" if name == "memcore" else name] for name in ("memcore", "eager", "faiss") if (op, name) in timings}
            at = len(run.rows)
            run.add("store", op + copy, f"(N={N},D={D},K={K})", "an entry" if steps > 1 else "a call", 1, shown, steps=steps)
            ours[op + copy, N] = run.rows[at]
        if not run.quick:
            _judge(ours, timings, N)
        if N <= BUILT:
            _approximate(run, keys, {name: of for name, of in variants.items() if name.startswith("memcore")}, one, query)
    if not run.quick:
        for copy in ("", COPY):
            first, last = (ours[f"write of {BATCH}{copy}", N] for N in (sizes[0], sizes[-1]))
            last["gate"] += f", {GROWS:g}x that of N = {sizes[0]:,}"
            last["passed"] &= last["ms_median"] <= GROWS * first["ms_median"]


def _judge(ours: dict[tuple[str, int], dict], timings: dict, N: int) -> None:
    for copy in ("", COPY):
        for op in ("write", f"write of {BATCH}"):
            row = ours[op + copy, N]
            row.update(gate=f"<= {WRITE_US:g} us", passed=1e3 * row["ms_median"] <= WRITE_US)
        pair, lookup = (timings[op, f"memcore{copy}"].median for op in ("lookup + write", "lookup"))
        row = ours[f"lookup + write{copy}", N]
        row.update(gate=f"<= {PAIR:g} lookups", passed=pair <= PAIR * lookup)
        if copy and ("lookup", "faiss") in timings:
            row["gate"] += f", {OF_FAISS:g} of the search by faiss"
            row["passed"] &= pair <= OF_FAISS * timings["lookup", "faiss"].median
