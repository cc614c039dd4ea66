"""NEC's read: checks, schema, autograd."""

import math

import torch
from torch import Tensor

from ... import _backend, _checks
from .. import _cuda
from .._op import library, register
from ..knn_search.op import CACHE, METRICS, NO_CACHE, KnnCache, arguments, call_sparse, plain, results, sparse_rows
from . import reference
from .reference import KnnLookup

__all__ = ["KnnLookup", "knn_lookup"]

_OP = "knn_lookup"
KERNELS = ("inverse_distance", "softmax", "uniform")


def _reference(query, keys, values, count, norms, mirror, rounding, k, metric, kernel, delta):
    return reference.knn_lookup(query, keys, values, k, kernel=KERNELS[kernel], delta=delta, metric=METRICS[metric], count=count)


def _fake(query, keys, values, count, norms, mirror, rounding, k, metric, kernel, delta):
    shape = results(query, keys, k)
    output = query.new_empty(*shape[:-1], values.shape[-1])
    numbers, indices = query.new_empty, lambda shape: query.new_empty(shape, dtype=torch.int64)
    return output, numbers(shape), indices(shape), numbers(shape), indices(shape)


_fwd = register(
    _OP,
    f"Tensor query, Tensor keys, Tensor values, Tensor? count, {CACHE}, int k, int metric, int kernel, float delta",
    _reference,
    _fake,
    outputs=4,
    saved=1,  # the indices again
    differentiable=("query", "keys", "values"),
)
# Gradients of the rows that are used: (query, rows [dictionary (if stacked) and index, U], their keys' [U, D], their values' [U, V]).
_ROWS = (
    "(Tensor? grad_output, Tensor? grad_weights, Tensor? grad_distances, Tensor indices, Tensor query, Tensor keys, "
    "Tensor values, int metric, int kernel, float delta) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"{_OP}_rows{_ROWS}")
_cuda.implement_rows(library, f"{_OP}_rows", _ROWS)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *found, kept = torch.ops.memcore.knn_lookup_fwd(*args)
        ctx.save_for_backward(*args[:3], kept)
        ctx.rest = args[-3:]
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output, weights, _, distances):
        query, keys, values, kept = ctx.saved_tensors
        dquery, rows, dkeys, dvalues = torch.ops.memcore.knn_lookup_rows(output, weights, distances, kept, query, keys, values, *ctx.rest)
        return (dquery, sparse_rows(rows, dkeys, keys), sparse_rows(rows, dvalues, values), *(None,) * 8)


def knn_lookup(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    kernel: str = "inverse_distance",
    delta: float = 1e-3,
    metric: str = "l2",
    count: Tensor | int | None = None,
    sparse: bool = False,
    cache: KnnCache | None = None,
) -> KnnLookup:
    """The values of the k nearest keys, weighted by distance (Pritzel et al. 2017, eq. 1-2, Neural Episodic Control's read).

    w_i = kernel(d_i) / sum_j kernel(d_j), output = sum_i w_i values_i over the k nearest keys of `knn_search`, where kernel(d) is
    1 / (d + delta) (inverse_distance), exp(-d / delta) (softmax) or 1 (uniform).

    Args:
        query: [Q, D], or [A, Q, D] with stacked keys. [Q, D] with stacked keys asks every dictionary.
        keys: [N, D], or [A, N, D]: A dictionaries in one call.
        values: [N, V] or [A, N, V].
        k: how many neighbours, >= 0.
        kernel: "inverse_distance", "softmax" or "uniform".
        delta: > 0, the kernel's width; not used by "uniform".
        metric, count, sparse, cache: as of `knn_search`; `sparse` holds for the values, too.

    Returns:
        KnnLookup(output [.., Q, V], weights [.., Q, K], indices [.., Q, K] int64, distances [.., Q, K]). Neighbours at distance +inf have
        weight 0, and output is 0 without any. Output, weights and distances are differentiable to any order in query, keys and values;
        at an exact hit the gradient of its distance is 0. A query with NaN or Inf gives NaN.

    Raises:
        ValueError: wrong shape, k, kernel, delta, metric or count; inverse_distance of ip, which has no sign. TypeError: not floating.
        RuntimeError: devices differ.

    Example:
        >>> import torch, memcore
        >>> keys, values = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.0], [3.0], [9.0]])
        >>> memcore.functional.knn_lookup(torch.tensor([[0.5]]), keys, values, 2).output
        tensor([[2.]])
    """
    kinds = kernel in KERNELS and type(delta) is float and 0 < delta < math.inf and (kernel != "inverse_distance" or metric != "ip")
    if kinds and values is not None and plain(_OP, query, keys, k, metric, count, cache, values):
        args = (query, keys, values, count, *(cache or NO_CACHE), k, METRICS.index(metric), KERNELS.index(kernel), delta)
        try:
            return KnnLookup(*(call_sparse(_Sparse, _fwd, args, 3) if sparse else _fwd(*args)))
        except RuntimeError:
            pass  # arguments that do not fit: the long way converts them or says which
    query, keys, values, *rest = arguments(_OP, query, keys, k, metric, count, cache, values)
    if kernel not in KERNELS:
        raise ValueError(f"memcore.{_OP}: 'kernel' must be 'inverse_distance', 'softmax' or 'uniform', got {kernel!r}")
    if kernel != "uniform":
        _checks.finite_number(_OP, "delta", delta)
        if not delta > 0:
            raise ValueError(f"memcore.{_OP}: 'delta' must be > 0, got {delta}")
    if kernel == "inverse_distance" and metric == "ip":
        raise ValueError(f"memcore.{_OP}: 'kernel' must be 'softmax' or 'uniform' with metric 'ip', got 'inverse_distance'")
    return checked_lookup((query, keys, values, *rest, k, METRICS.index(metric), KERNELS.index(kernel), float(delta)), sparse)


def checked_lookup(args: tuple, sparse: bool) -> KnnLookup:
    """`knn_lookup` of arguments that fit: those of the operator's schema."""
    query, keys, values, count, _, _, _, k, metric, kernel, delta = args
    dense = not sparse or torch.compiler.is_compiling()
    kernels = _backend.takes_kernel(_OP, query.device)
    if kernels and dense:
        return KnnLookup(*_fwd(*args))
    if kernels and _cuda.takes_rows(_OP, query, keys, k):
        return KnnLookup(*call_sparse(_Sparse, _fwd, args, 3))
    options = {"kernel": KERNELS[kernel], "delta": delta, "metric": METRICS[metric], "count": count}
    return reference.knn_lookup(query, keys, values, k, **options, sparse=not dense)
