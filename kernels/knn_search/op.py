"""Nearest neighbours: checks, schema, autograd."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend, _checks
from .. import _cuda
from .._op import accumulate, library, no_autocast, register
from . import reference

__all__ = ["CACHE", "METRICS", "NO_CACHE", "KnnCache", "arguments", "call_sparse", "knn_cache", "knn_search", "plain", "results", "sparse_rows"]

_OP = "knn_search"
METRICS = ("l2", "cosine", "ip")


class KnnCache(NamedTuple):
    """What a dictionary knows of its keys beforehand. Whoever changes a key changes its entries, too."""

    norms: Tensor
    """[.., N] squared norms, float32 (float64 for float64 keys)."""
    mirror: Tensor | None = None
    """[.., N, D] keys.bfloat16() of float32 keys, which the CPU scans instead of them."""
    rounding: Tensor | None = None
    """[..] at least max |mirror - key| / |key|, float32; without it 2^-8."""


def _reference(query, keys, count, norms, mirror, rounding, k, metric):
    return reference.knn_search(query, keys, k, metric=METRICS[metric], count=count)


def results(query: Tensor, keys: Tensor, k: int) -> tuple[int, ...]:
    """Shape of indices and distances."""
    return (*keys.shape[:-2], query.shape[-2], k)


def _fake(query, keys, count, norms, mirror, rounding, k, metric):
    shape = results(query, keys, k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.int64)


CACHE = "Tensor? norms, Tensor? mirror, Tensor? rounding"
_fwd = register(
    _OP,
    f"Tensor query, Tensor keys, Tensor? count, {CACHE}, int k, int metric",
    _reference,
    _fake,
    outputs=2,
    saved=1,  # the indices again
    differentiable=("query", "keys"),
)
# Gradients of the rows that are used: (query, rows [dictionary (if stacked) and index, U], their gradients [U, D]).
# On a GPU a row may come several times.
_ROWS = "(Tensor? grad, Tensor indices, Tensor query, Tensor keys, int metric) -> (Tensor, Tensor, Tensor)"
library.define(f"{_OP}_rows{_ROWS}")
_cuda.implement_rows(library, f"{_OP}_rows", _ROWS)


def knn_cache(keys: Tensor, *, bf16: bool = False) -> KnnCache:
    """What `knn_search` and `knn_lookup` can be told about keys that are searched often.

    Args:
        keys: [N, D] or [A, N, D].
        bf16: keep a copy in bfloat16, too (float32 keys). On the CPU candidates are found by it, with the same neighbours and distances as without
            it: those that it cannot prove are searched again by the keys themselves.

    Returns:
        KnnCache. It does not follow later changes of the keys.

    Raises:
        ValueError: wrong shape. TypeError: not floating, or bf16 of keys that are not float32.
    """
    (keys,) = _checks.common("knn_cache", ("keys", keys))
    _checks.dims("knn_cache", "keys", keys, "A, N, D", "N, D")
    if bf16 and keys.dtype != torch.float32:
        raise TypeError(f"memcore.knn_cache: 'keys' must be float32 to have a bfloat16 copy, got {keys.dtype}")
    with torch.no_grad(), no_autocast(keys):
        norms = accumulate(keys).square().sum(-1)
        if not bf16:
            return KnnCache(norms)
        mirror = keys.bfloat16()
        # Rounded up; a key that is no number, or whose copy is none, is never found by its copy.
        wide, norm = torch.float32 if keys.device.type == "mps" else torch.float64, torch.linalg.vector_norm
        lost = norm(mirror.float() - keys, dim=-1, dtype=wide) / norm(keys, dim=-1, dtype=wide)
        ratio = lost.mul(1.001).nan_to_num(0, 0, 0).float()
        return KnnCache(norms, mirror, ratio.amax(-1) if keys.shape[-2] else ratio.sum(-1))


_CPU, NO_CACHE = torch.device("cpu"), (None, None, None)


def plain(
    op: str, query: Tensor, keys: Tensor, k: int, metric: str, count: Tensor | None, cache: KnnCache | None, values: Tensor | None = None
) -> bool:
    """Whether the CPU's kernel may be called at once, which judges shapes and types itself: after a search the caches are cold, and every step in
    Python costs several times what it does in a loop."""
    if not (type(query) is type(keys) is Tensor and type(k) is int and type(metric) is str and metric in METRICS):
        return False
    for t in (query, keys, values, count, *(cache if type(cache) is KnnCache else () if cache is None else (0,))):
        if t is not None and not (type(t) is Tensor and t.is_cpu):  # the dispatcher would ask another device
            return False
    return _backend.native is not None and not torch.compiler.is_compiling() and _backend.takes_kernel(op, _CPU)


def arguments(
    op: str, query: Tensor, keys: Tensor, k: int, metric: str, count: Tensor | int | None, cache: KnnCache | None, *values: Tensor
) -> tuple:
    """Checked arguments of a search: query, keys, values..., count, the cache's three."""
    given = keys.dtype if isinstance(keys, Tensor) else None
    query, keys, *values = _checks.common(op, ("query", query), ("keys", keys), *(("values", v) for v in values))
    q, s = query.shape, keys.shape
    fit = len(s) == 3 and len(q) in (2, 3) and q[-1] == s[2] and (len(q) == 2 or q[0] == s[0]) or len(s) == len(q) == 2 and q[1] == s[1]
    if not (fit and all(v.shape[:-1] == s[:-1] for v in values)):
        _refuse_shapes(op, query, keys, values)
    _checks.whole(op, "k", k, 0)
    if metric not in METRICS:
        raise ValueError(f"memcore.{op}: 'metric' must be 'l2', 'cosine' or 'ip', got {metric!r}")
    return query, keys, *values, _count(op, count, keys), *_cache(op, cache, keys, given)


def _refuse_shapes(op: str, query: Tensor, keys: Tensor, values: list[Tensor]) -> None:
    """Tells what does not fit."""
    _checks.dims(op, "query", query, "A, Q, D", "Q, D")
    _checks.dims(op, "keys", keys, "A, N, D", "N, D")
    N, D = keys.shape[-2:]
    if keys.dim() == 3:
        A = query.shape[0] if query.dim() == 3 else keys.shape[0]
        _checks.shape(op, "keys", keys, "A, N, D", (A, N, query.shape[-1]), "query", query.shape)
    else:
        sizes = (N, query.shape[-1]) if query.dim() == 2 else (query.shape[0], N, query.shape[-1])
        _checks.shape(op, "keys", keys, "N, D" if query.dim() == 2 else "A, N, D", sizes, "query", query.shape)
    for v in values:
        _checks.dims(op, "values", v, "A, N, V", "N, V")
        symbols = "A, N, V" if keys.dim() == 3 else "N, V"
        _checks.shape(op, "values", v, symbols, (*keys.shape[:-1], v.shape[-1]), "keys", keys.shape)


def _count(op: str, count: Tensor | int | None, keys: Tensor) -> Tensor | None:
    if count is None:
        return None
    if isinstance(count, Tensor):
        if count.dtype.is_floating_point or count.dtype.is_complex or count.dtype == torch.bool:
            raise TypeError(f"memcore.{op}: 'count' must be an int or an integer tensor, got {count.dtype}")
        if count.device != keys.device:
            raise RuntimeError(f"memcore.{op}: 'count' must be on the device of 'query' ({keys.device}), got {count.device}")
        if count.dim() > 0:
            sizes = (keys.shape[0],) if keys.dim() == 3 else (1,)
            _checks.shape(op, "count", count, "A", sizes, "keys", keys.shape)
            if count.dtype == torch.int64:
                return count
    else:
        _checks.whole(op, "count", count, 0)
        if count > keys.shape[-2]:
            raise ValueError(f"memcore.{op}: 'count' must be at most N = {keys.shape[-2]}, got {count}")
    return reference.as_count(count, keys)


def _cache(op: str, cache: KnnCache | None, keys: Tensor, given: torch.dtype) -> tuple:
    if cache is None or given != keys.dtype:
        return None, None, None
    if not isinstance(cache, KnnCache):
        raise TypeError(f"memcore.{op}: 'cache' must be a KnnCache, got {type(cache).__name__}")
    norms, mirror, rounding = cache
    shape, device, single = keys.shape, keys.device, keys.dtype is torch.float32
    fits = (
        single and (norms is None or (norms.dtype is torch.float32 and norms.shape == shape[:-1] and norms.device == device))
        and (mirror is None or (mirror.dtype is torch.bfloat16 and mirror.shape == shape and mirror.device == device))
        and (rounding is None or (rounding.dtype is torch.float32 and rounding.shape == shape[:-2] and rounding.device == device))
    )  # fmt: skip
    if not fits:
        _check_cache(op, cache, keys)
    return cache if single else (norms, None, None)


def _check_cache(op: str, cache: KnnCache, keys: Tensor) -> None:
    wanted = torch.promote_types(keys.dtype, torch.float32)
    for name, t, sizes, dtype in (
        ("cache.norms", cache.norms, keys.shape[:-1], wanted),
        ("cache.mirror", cache.mirror, keys.shape, torch.bfloat16),
        ("cache.rounding", cache.rounding, keys.shape[:-2], torch.float32),
    ):
        if t is None:
            continue
        if t.dtype != dtype:
            raise TypeError(f"memcore.{op}: {name!r} must be {dtype}, got {t.dtype}")
        if t.device != keys.device:
            raise RuntimeError(f"memcore.{op}: {name!r} must be on the device of 'query' ({keys.device}), got {t.device}")
        if t.shape != sizes:
            raise ValueError(f"memcore.{op}: {name!r} must have shape {tuple(sizes)} to match 'keys' {tuple(keys.shape)}, got {tuple(t.shape)}")


def sparse_rows(rows: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(rows, values, like.shape, is_coalesced=like.device.type == "cpu", check_invariants=False)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        distances, indices, kept = torch.ops.memcore.knn_search_fwd(*args)
        ctx.save_for_backward(*args[:2], kept)
        ctx.metric = args[-1]
        ctx.set_materialize_grads(False)
        return distances, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        query, keys, kept = ctx.saved_tensors
        dquery, rows, dkeys = torch.ops.memcore.knn_search_rows(grad, kept, query, keys, ctx.metric)
        return (dquery, sparse_rows(rows, dkeys, keys), *(None,) * 6)


def call_sparse(function: type[torch.autograd.Function], dense: Callable, args: tuple, tensors: int) -> tuple:
    """`function` where a row-sparse gradient is wanted, `dense` where none is."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:tensors]):
        return function.apply(*args)
    return dense(*args)


def knn_search(
    query: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: str = "l2",
    count: Tensor | int | None = None,
    sparse: bool = False,
    cache: KnnCache | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of every query, exactly.

    distance(q, n) = |q - n|^2 (l2), 1 - q.n / (max(|q|, 1e-8) max(|n|, 1e-8)) (cosine; 1 where q or n is zero), -q.n (ip), ascending by
    (distance, index): the lowest index wins a tie, on every backend and with any number of threads.

    Args:
        query: [Q, D], or [A, Q, D] with stacked keys. [Q, D] with stacked keys asks every dictionary.
        keys: [N, D], or [A, N, D]: A dictionaries in one call.
        k: how many, >= 0. With fewer rows than that the rest is index -1 at distance +inf.
        metric: "l2" (squared), "cosine" or "ip".
        count: how many rows are valid, an int or an integer tensor [A]; the rows behind are never read. A tensor is clamped to 0..N.
        sparse: gradients of keys are sparse tensors that hold the rows found and no others (as of torch.nn.Embedding(sparse=True)), so
            that the backward's cost does not depend on N. Eager, first derivatives.
        cache: `knn_cache(keys)`, which spares the search its norms.

    Returns:
        (distances, indices int64), each [Q, K], or [A, Q, K] with stacked keys. Distances are differentiable to any order in query and
        keys; the backward reads the query and the keys found. Keys with NaN or Inf come last, at distance +inf. A query with NaN or Inf
        finds indices -1 at distance NaN.

    Raises:
        ValueError: wrong shape, k, metric or count. TypeError: not floating. RuntimeError: devices differ.

    Example:
        >>> import torch, memcore
        >>> keys = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
        >>> memcore.functional.knn_search(torch.zeros(1, 2), keys, 2)
        (tensor([[0., 1.]]), tensor([[0, 2]]))
    """
    if plain(_OP, query, keys, k, metric, count, cache):
        args = (query, keys, count, *(cache or NO_CACHE), k, METRICS.index(metric))
        try:
            return call_sparse(_Sparse, _fwd, args, 2) if sparse else _fwd(*args)
        except RuntimeError:
            pass  # arguments that do not fit: the long way converts them or says which
    query, keys, *rest = arguments(_OP, query, keys, k, metric, count, cache)
    dense = not sparse or torch.compiler.is_compiling()
    if not _backend.takes_kernel(_OP, query.device):
        return reference.knn_search(query, keys, k, metric=metric, count=rest[0], sparse=not dense)
    args = (query, keys, *rest, k, METRICS.index(metric))
    if dense:
        return _fwd(*args)
    if not _cuda.takes_rows(_OP, query, keys, k):
        return reference.knn_search(query, keys, k, metric=metric, count=rest[0], sparse=True)
    return call_sparse(_Sparse, _fwd, args, 2)
