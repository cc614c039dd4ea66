"""NEC's read in Triton: the search, then a program a query weighs what it found and adds up the values. The backward is `knn_search`'s."""

import struct

import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch, power
from ..knn_search.triton import gradients, search, shapes, weigh

__all__ = ["knn_lookup_bwd", "knn_lookup_fwd", "knn_lookup_rows"]


@triton.jit(do_not_specialize=["Q", "N", "K", "V", "delta_bits"])
def knn_lookup_fwd_kernel(
    p_near, p_indices, p_values, p_weights, p_output, Q, N, K, V, delta_bits, KERNEL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """w_i = kernel(d_i) / sum_j kernel(d_j), output = sum_i w_i v_i of one query (Pritzel et al. 2017, eq. 1-2)."""
    item = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    d = tl.load(p_near + item * K + k, mask=k < K, other=float("inf"))
    row = tl.load(p_indices + item * K + k, mask=k < K, other=-1)
    on = tl.abs(d) < float("inf")
    lost = tl.max((d != d).to(tl.int32), 0) != 0  # the query is no number
    w = weigh(d, delta_bits, KERNEL).to(tl.float32)
    tl.store(p_weights + item * K + k, tl.where(lost, float("nan"), w).to(p_weights.dtype.element_ty), mask=k < K)
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)
        value = tl.load(p_values + (item // Q * N + row)[:, None] * V + v[None, :], mask=on[:, None] & (v < V)[None, :], other=0).to(tl.float32)
        total = tl.where(lost, float("nan"), tl.sum(w[:, None] * value, 0))
        tl.store(p_output + item * V + v, total.to(p_output.dtype.element_ty), mask=v < V)


def bits(delta: float) -> int:
    return struct.unpack("<q", struct.pack("<d", delta))[0]


def knn_lookup_fwd(
    query: Tensor, keys: Tensor, values: Tensor, count: Tensor | None, norms: Tensor | None, mirror: Tensor | None, rounding: Tensor | None,
    k: int, metric: int, kernel: int, delta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """memcore::knn_lookup_fwd."""
    query, keys, values, count = (t if t is None else t.contiguous() for t in (query, keys, values, count))
    distances, indices, kept, near = search(query, keys, count, k, metric)
    A, Q, N, _, _, lead = shapes(query, keys)
    V = values.shape[-1]
    output, weights = query.new_empty(*lead, V), query.new_empty(*lead, k)
    BK = max(64, power(k))
    BV = max(1, min(16, 4096 // BK))
    args = near, indices, values, weights, output, Q, N, k, V, bits(delta)
    launch(knn_lookup_fwd_kernel, A * Q, *args, num_warps=4, all_registers=True, KERNEL=kernel, BK=BK, BV=BV)
    return output, weights, indices, distances, kept


def knn_lookup_bwd(
    grad_output: Tensor | None, grad_weights: Tensor | None, grad_indices: Tensor | None, grad_distances: Tensor | None, indices: Tensor,
    query: Tensor, keys: Tensor, values: Tensor, count: Tensor | None, norms: Tensor | None, mirror: Tensor | None, rounding: Tensor | None,
    k: int, metric: int, kernel: int, delta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """memcore::knn_lookup_bwd."""
    return gradients(grad_output, grad_weights, grad_distances, indices, query, keys, values, metric, kernel, bits(delta))[:3]


def knn_lookup_rows(
    grad_output: Tensor | None, grad_weights: Tensor | None, grad_distances: Tensor | None, indices: Tensor, query: Tensor, keys: Tensor,
    values: Tensor, metric: int, kernel: int, delta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """memcore::knn_lookup_rows."""
    args = grad_output, grad_weights, grad_distances, indices, query, keys, values, metric, kernel, bits(delta)
    dquery, dkeys, dvalues, rows = gradients(*args, sparse=True)
    return dquery, rows, dkeys, dvalues
