"""The suite `store`: memcore.DND's lookup, write and both, against a ring in plain PyTorch and faiss, as N grows."""

import itertools
from collections.abc import Callable

import torch

from .. import stores
from . import measure
from .runner import Run

__all__ = ["store"]

D, K, BATCH = 64, 50, 32
SIZES, QUICK = (10_000, 100_000, 500_000), (1_000,)
WRITE_US, PAIR, OF_FAISS, GROWS = 3.0, 1.05, 0.6, 1.5  # gates; a write must not cost GROWS times as much at the largest size as at the least
COPY = ", bf16 copy"
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
    import numpy as np

    index, asked, oldest = faiss.IndexFlatL2(D), query.numpy(), np.zeros(1, np.int64)
    index.add(keys.numpy())

    def write() -> None:
        index.remove_ids(oldest)
        index.add(one()[0].numpy())

    return {"lookup": lambda: index.search(asked, K), "write": write, "lookup + write": lambda: (index.search(asked, K), write())}


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
