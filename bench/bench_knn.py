"""The suite `knn`: exact search of the K nearest keys, by float32 keys and by their bfloat16 copies, against PyTorch and faiss, and its backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import data, functional
from . import measure
from .runner import Run

__all__ = ["K", "check", "gaussian", "knn"]

K, DELTA = 50, 1e-3
GRID = {  # size -> (N, D) and the numbers of queries
    "small": (((10_000, 64), (1, 32, 512)),),
    "mid": (((100_000, 64), (1, 32, 512)), ((100_000, 128), (1, 32))),
    "large": (((500_000, 64), (1, 32, 512)),),
}
QUICK = (((2_000, 24), (1, 40)),)
REAL = {"small": ("SIFT",), "mid": ("MNIST", "Omniglot"), "large": ()}
REAL_QUERIES = (1, 32, 100)
GATES = {"float32": (0.95, 1.5), "bfloat16": (1.7, 2.5)}  # times faster than faiss with one query; with 32 and more
BF16_ROWS = 100_000  # from which that of bfloat16 holds with 32 queries
BACKWARD, BACKWARD_QUERIES, GROWS = 5.0, 32, 1.5  # times faster than eager; may cost so much more at the largest size than at the least
CHECKED = 4  # queries whose answers are computed in float64


class _Set(NamedTuple):
    name: str
    keys: Tensor
    query: Tensor


def gaussian(N: int, D: int, Q: int, seed: int) -> _Set:
    g = torch.Generator().manual_seed(seed)
    return _Set("Gaussian", torch.randn(N, D, generator=g), torch.randn(Q, D, generator=g))


def _real(name: str, seed: int) -> _Set:
    """SIFT descriptors; MNIST's pixels, 0..255, asked for its test digits; Omniglot's drawings at 10 x 10, 0..1, asked for other drawings of them."""
    if name == "SIFT":
        v = data.vectors()
        return _Set(name, torch.from_numpy(v.base).float(), torch.from_numpy(v.query).float())
    if name == "MNIST":
        m = data.mnist()
        return _Set(name, torch.from_numpy(m.x_train).reshape(-1, 784).float(), torch.from_numpy(m.x_test).reshape(-1, 784).float())
    drawings = torch.from_numpy(data.omniglot(size=10).images.copy()).flatten(0, 1).reshape(-1, 100) / 255
    order = torch.randperm(len(drawings), generator=torch.Generator().manual_seed(seed))
    return _Set(name, drawings[order[512:]].contiguous(), drawings[order[:512]].contiguous())


def _nearest(query: Tensor, keys: Tensor, k: int) -> Tensor:
    """Float64 distances [k] of one query by difference, ascending."""
    return (query.double() - keys.double()).square().sum(1).sort().values[:k]


def check(name: str, shape: str, distances: Tensor, query: Tensor, keys: Tensor) -> None:
    """Distances of the neighbours against float64; those by products cancel, so that they are right to the size of the numbers alone."""
    for i in dict.fromkeys((*range(min(CHECKED // 2, len(query))), *range(max(0, len(query) - CHECKED // 2), len(query)))):
        wanted = _nearest(query[i], keys, distances.shape[1])
        room = 1e-6 * wanted if name.startswith("memcore") else 1e-4 * wanted + 1e-5 * (query[i].double().square().sum() + wanted)
        if not ((distances[i].double() - wanted).abs() <= room + 1e-30).all():
            raise RuntimeError(f"memcore bench: the neighbours of {name} knn_search {shape} are wrong; nothing is timed")


def _faiss(run: Run, keys: Tensor, query: Tensor, k: int) -> Callable[[], Any] | None:
    """IndexFlatL2 at the better of its settings, which differ in how many queries make it take matrix products."""
    try:
        import faiss
    except ImportError:
        run.tell_once("knn: faiss is not installed, left out; its gates are not judged")
        return None
    faiss.omp_set_num_threads(1)
    index, asked, default = faiss.IndexFlatL2(keys.shape[1]), query.numpy(), faiss.cvar.distance_compute_blas_threshold
    index.add(keys.numpy())

    def search(threshold: int) -> Tensor:
        faiss.cvar.distance_compute_blas_threshold = threshold
        try:
            return torch.from_numpy(index.search(asked, k)[0])
        finally:
            faiss.cvar.distance_compute_blas_threshold = default

    settings = {t: (lambda t=t: search(t)) for t in (default, 1, 1 << 30)}
    times = measure.interleave(settings, wall=False, seconds=0, least=2)
    return settings[min(times, key=lambda t: min(times[t].samples))]


def _search(run: Run, s: _Set, Q: int, k: int) -> None:
    """Four variants in the same rounds; a row each for float32 and for bfloat16."""
    keys, query = s.keys, s.query[:Q].contiguous()
    N, D = keys.shape
    shape = f"{s.name} (N={N},D={D},Q={Q},K={k})"
    norms, plain, mirrored = keys.square().sum(1), functional.knn_cache(keys), functional.knn_cache(keys, bf16=True)
    calls: dict[str, Callable[[], Any]] = {
        "memcore": lambda: functional.knn_search(query, keys, k, cache=plain),
        "memcore bf16": lambda: functional.knn_search(query, keys, k, cache=mirrored),
        "eager": lambda: torch.addmm(norms, query, keys.T, alpha=-2).topk(k, largest=False, sorted=True),
    }
    rescans = getattr(torch.ops.memcore, "_knn_rescans", lambda: 0)
    before = rescans()
    found = {name: call() for name, call in calls.items()}
    share = (rescans() - before) / Q
    for name in ("memcore", "memcore bf16"):
        check(name, shape, found[name][0], query, keys)
    check("eager", shape, found["eager"][0] + query.square().sum(1, keepdim=True), query, keys)
    if not all(torch.equal(a, b) for a, b in zip(found["memcore"], found["memcore bf16"], strict=True)):
        raise RuntimeError(f"memcore bench: the neighbours of memcore bf16 knn_search {shape} are not those of memcore; nothing is timed")
    fast = _faiss(run, keys, query, k)
    if fast is not None:
        check("faiss", shape, fast(), query, keys)
        calls["faiss"] = fast
    if Q > 1:  # what multiplies queries and keys, whoever does it
        calls["products"] = measure.products(Q * N * D)
    else:  # one query has to read the keys
        calls["reads"], calls["reads bf16"] = keys.view(-1).sum, keys.view(-1)[: keys.numel() // 2].sum
    timings = run.time(calls, 1, 6)
    run.say(f"knn: {shape}: {100 * share:.3g} % of the queries were searched again by the float32 keys")
    for dtype, suffix in (("float32", ""), ("bfloat16", " bf16")):
        name = f"memcore{suffix}"
        shown = {"memcore": timings[name], **{n: timings[n] for n in ("eager", "faiss", "products") if n in timings}}
        if Q == 1:
            shown["reads"] = timings[f"reads{suffix}"]
        op = "knn_search" if dtype == "float32" else "knn_search, bf16 cache"
        before_rows = len(run.rows)
        run.add("knn", op, shape, "fwd", 1, shown, bytes=N * D * (4 if dtype == "float32" else 2), flops=2 * Q * N * D)
        gate = GATES[dtype][Q >= 32]
        if "faiss" in timings and not run.quick and (dtype == "float32" or Q < 32 or N >= BF16_ROWS):
            run.rows[before_rows].update(gate=f"{gate:g}x faiss", passed=timings["faiss"].median >= gate * timings[name].median)


def _backward(run: Run, s: _Set, Q: int, k: int) -> dict[str, Any]:
    """From the output to query, keys and values, the neighbours known; memcore's row."""
    N, D = s.keys.shape
    g = torch.Generator().manual_seed(run.seed)
    values, cotangent = torch.randn(N, 1, generator=g), torch.randn(Q, 1, generator=g)
    leaves = [t.detach().clone().requires_grad_() for t in (s.query[:Q], s.keys, values)]
    query, keys, values = leaves

    def eager(gather: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            at = torch.addmm(keys.square().sum(1), query, keys.T, alpha=-2).topk(k, largest=False, sorted=True).indices
        weights = 1 / ((query[:, None] - gather(keys, at)).square().sum(-1) + DELTA)
        return ((weights / weights.sum(-1, keepdim=True))[..., None] * gather(values, at)).sum(1)

    outputs = {
        "memcore": functional.knn_lookup(query, keys, values, k, delta=DELTA, sparse=True, cache=functional.knn_cache(keys)).output,
        "eager": eager(lambda t, at: t[at]),  # gradients of all rows
        "sparse eager": eager(lambda t, at: F.embedding(at, t, sparse=True)),  # of the rows used as ours, but for those used twice
    }
    calls = {name: (lambda y=y: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)) for name, y in outputs.items()}
    dense = {name: [t.to_dense() if t.is_sparse else t for t in call()] for name, call in calls.items()}
    for name, found in dense.items():
        for a, b in zip(found, dense["eager"], strict=True):
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())):
                raise RuntimeError(f"memcore bench: a gradient of {name} knn_lookup (N={N},D={D},Q={Q},K={k}) is wrong; nothing is timed")
    del dense
    timings = run.time(calls, 1, 2)
    before = len(run.rows)
    run.add("knn", "knn_lookup, sparse", f"{s.name} (N={N},D={D},Q={Q},K={k})", "bwd", 1, timings)
    return run.rows[before]


def knn(run: Run) -> None:
    """One thread. Search on Gaussian keys and on real ones where they are found; the backward at every size."""
    k = 10 if run.quick else K
    backward = []
    with measure.threads(1):
        for size in ("quick",) if run.quick else run.sizes:
            with torch.no_grad():
                for (N, D), counts in QUICK if run.quick else GRID[size]:
                    s = gaussian(N, D, max(counts), run.seed)
                    for Q in counts:
                        _search(run, s, Q, k)
                for name in () if run.quick else REAL[size]:
                    try:
                        s = _real(name, run.seed)
                    except data.DataNotFound as e:
                        run.tell_once(f"knn: {e}")
                        continue
                    for Q in REAL_QUERIES:
                        _search(run, s, Q, k)
            (N, D), _ = (QUICK if run.quick else GRID[size])[0]
            backward.append(_backward(run, gaussian(N, D, BACKWARD_QUERIES, run.seed), BACKWARD_QUERIES, k))
    if run.quick:
        return
    for row in backward:
        row.update(gate=f"{BACKWARD:g}x eager", passed=row["ratio_vs_eager"] >= BACKWARD)
    if len(backward) > 1:
        backward[-1]["gate"] += f", {GROWS:g}x that of the least N"
        backward[-1]["passed"] &= backward[-1]["ms_median"] <= GROWS * backward[0]["ms_median"]
