"""Exact search in Triton, and the gradients of a search and of NEC's read, which `knn_lookup` shares.

Scan: programs over tiles of queries and shards of rows compare in float32 (l2 by difference, else by products) and keep for each query and
shard the candidates of lowest score. Finish, a program a query: the lowest of all shards, their distances by difference in float64, rounded
once as on every backend, and a certificate that no other row is among the K nearest; a query that fails (many ties, overflow) is compared
with every row. Lists lie in a workspace: a tile's survivors are appended, and a list that is full is cut to its best by counting ranks.
Backward: a program a query, then one a neighbour, of which the first of each row in sorted order adds up the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import EPS, launch, power, sizes, wide, workspace

__all__ = ["gradients", "knn_search_bwd", "knn_search_fwd", "knn_search_rows", "search", "shapes", "weigh"]

L2, COSINE = tl.constexpr(0), tl.constexpr(1)
INVERSE_DISTANCE, SOFTMAX = tl.constexpr(0), tl.constexpr(1)
ALONE = tl.constexpr(3)  # no read: a search's own backward
NOBODY = tl.constexpr(2**63 - 1)  # behind every candidate
TAKES_NOBODY = tl.constexpr(-(2**63))
BLOCKS = 264  # two for each multiprocessor of an H100; a constant, so that a result does not depend on the card
CHUNK = 16  # columns of keys and queries at a time

# Candidates -----------------------------------------------------------------------------------------------------------
#
# One integer, whose order is that of (score, row): no ties, so that every selection has one outcome.


@triton.jit
def pack(score, row):
    """Of float32 scores, not NaN, and int64 rows."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32) | row


@triton.jit
def score_of(candidate):
    bits = (candidate >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def row_of(candidate):
    return candidate & 0xFFFFFFFF


@triton.jit
def cut(p_from, p_to, step, size, keep, BX: tl.constexpr, BY: tl.constexpr):
    """The least `keep` of `size` candidates at p_from, in order, to every `step`-th place at p_to, and nobody behind them; how many, and the last one.

    Each goes to the place that it has in the order. The last is NOBODY while there are fewer than `keep`. Reads what others stored before a barrier.
    """
    last = tl.zeros([], tl.int64) + NOBODY
    for x0 in range(0, tl.maximum(size, keep), BX):
        i = x0 + tl.arange(0, BX)
        x = tl.load(p_from + i, mask=i < size, other=NOBODY)
        smaller = tl.zeros([BX, BY], tl.int32)
        for y0 in range(0, size, BY):
            j = y0 + tl.arange(0, BY)
            y = tl.load(p_from + j, mask=j < size, other=NOBODY)
            smaller += (y[None, :] < x[:, None]).to(tl.int32)
        rank = tl.sum(smaller, 1)
        tl.store(p_to + rank.to(tl.int64) * step, x, mask=(i < size) & (rank < keep))
        tl.store(p_to + i.to(tl.int64) * step, tl.full([BX], NOBODY, tl.int64), mask=(i >= size) & (i < keep))
        last = tl.minimum(last, tl.min(tl.where((i < size) & (rank == keep - 1), x, NOBODY), 0))
    return tl.minimum(size, keep), last


@triton.jit
def offer(p_list, x, theta, size):
    """Append the candidates x [BN] below theta; the new size."""
    take = x < theta
    t = take.to(tl.int32)
    tl.store(p_list + (size + tl.cumsum(t, 0) - t), x, mask=take)
    return size + tl.sum(t, 0)


# Distances ------------------------------------------------------------------------------------------------------------


@triton.jit
def rows_of(p_count, b, N):
    """Valid rows of dictionary b."""
    rows = wide(N)
    if p_count is not None:
        rows = tl.minimum(tl.maximum(tl.load(p_count + b), 0), rows)
    return rows


@triton.jit
def norm_of(n2):
    """Of squared lengths in float64: what cosine divides by, the squared length of the quotient (NaN of an overflow), 0 where the vector counts as zero,
    where its length is below eps."""
    small = n2 < 1e-16
    eps = n2 * 0 + 1e-8
    length = tl.where(small, eps, tl.sqrt(n2))
    square = tl.where(small, n2 / 1e-16, 1 + (n2 - n2))
    return length, square, n2.to(tl.float32), small


@triton.jit
def squared_length(p, D, BD: tl.constexpr):
    """|p|^2 in float64, and whether p has a number that is none."""
    total = tl.zeros([BD], tl.float64)
    bad = tl.zeros([BD], tl.int32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(p + d, mask=d < D, other=0).to(tl.float32)
        bad = tl.where(tl.abs(x) < float("inf"), bad, 1)
        total += x.to(tl.float64) * x.to(tl.float64)
    return tl.sum(total, 0), tl.max(bad, 0)


@triton.jit
def exact(p_query, own2, p_keys, rows, ok, D, METRIC: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Distances of the query from rows [BR] where ok, +inf where they are not finite; under cosine also the rows' squared lengths. own2: |query|^2.

    Summed in float64 and rounded once. Quotients, which no compiler fuses: equal vectors differ by nothing.
    """
    total = tl.zeros([BR, BD], tl.float64)
    norm2 = tl.zeros([BR], tl.float64)
    if METRIC == COSINE:
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            k = tl.load(p_keys + rows[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0).to(tl.float64)
            total += k * k
        norm2 = tl.sum(total, 1)
        total = tl.zeros([BR, BD], tl.float64)
    length, square, single, _small = norm_of(own2)
    length_k, square_k, single_k, _small_k = norm_of(norm2)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        q = tl.load(p_query + d, mask=d < D, other=0).to(tl.float64)
        k = tl.load(p_keys + rows[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0).to(tl.float64)
        if METRIC == L2:
            t = q[None, :] - k
            total += t * t
        elif METRIC == COSINE:
            t = (q / length)[None, :] - k / length_k[:, None]
            total += t * t
        else:
            total -= q[None, :] * k
    s = tl.sum(total, 1)
    if METRIC == COSINE:
        half = 0.5 * s + (1 - 0.5 * (square + square_k))
        half = tl.where(half < 1e-30, 0.0, half)  # rounding of parallel vectors
        s = tl.where((tl.abs(square_k) < float("inf")) & (tl.minimum(single, single_k) == 0), 1.0, half)
    distance = s.to(tl.float32)
    return tl.where(tl.abs(distance) < float("inf"), distance, float("inf")), norm2


@triton.jit
def scale_of(n2, METRIC: tl.constexpr):
    """What a query's length counts as where scores are of its direction, in float64."""
    floor = n2 * 0 + 1e-30
    if METRIC == COSINE:
        floor = n2 * 0 + 1e-8
    return tl.maximum(tl.sqrt(n2), floor)


# What float32 sums of D products may be wrong by, relative to the lengths, is (2 D + 16) / 2^24: twice what is needed.


@triton.jit
def score(total, n2, error, METRIC: tl.constexpr):
    """The number whose least are wanted: of l2 the distance, of cosine -cos, of ip a lower bound of the distance over |q|.

    +inf: never a neighbour at a finite distance; -inf: not to be told in float32.
    """
    s = total
    if METRIC != L2:
        norm = tl.sqrt_rn(n2)
        if METRIC == COSINE:
            s = -total / tl.maximum(norm, EPS)
        else:
            s = -total - error * (norm + 1e-18)
    s = tl.where(tl.abs(s) < float("inf"), s, float("inf"))
    if METRIC != L2:
        s = tl.where(n2 > 1e37, -float("inf"), s)
    return s


@triton.jit
def lower_bound(least, D, scale, METRIC: tl.constexpr):
    """What the distance of a row with a score of at least `least` is at least, as it is rounded."""
    s = least.to(tl.float64)
    error = (2 * wide(D) + 16).to(tl.float64) / 16777216
    if METRIC == L2:
        most = s * 0 + 3.4e38
        bound = tl.where(s < 3.4e38, s, most) * (1 - error) - wide(D).to(tl.float64) * 1e-44
    elif METRIC == COSINE:
        bound = 1 + s - error - 1e-7
    else:
        bound = scale * s
    return bound.to(tl.float32)


# Forward --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["Q", "N", "tiles", "shards", "keep", "capacity", "stride"])
def knn_search_fwd_kernel_scan(
    p_query, p_keys, p_count, p_lists, p_found, Q, N, D, tiles, shards, keep, capacity, stride,
    METRIC: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """A tile's and shard's candidates of lowest score, ascending along `keep`, into found [A, Q, keep, shards].

    p_lists [A, Q, shards, 2, capacity]: two lists for each query, cut from the one into the other.
    """
    i = tl.program_id(0).to(tl.int64)
    q0, shard, i_b = i % tiles * BQ, i // tiles % shards, i // tiles // shards
    iq = tl.arange(0, BQ)
    q = q0 + iq
    real = q < Q
    rows = rows_of(p_count, i_b, N)
    begin, end = rows * shard // shards, rows * (shard + 1) // shards
    p_query += i_b * stride
    p_keys += i_b * N * D
    there = tl.minimum(BQ, Q - q0).to(tl.int32)
    apart = wide(2) * capacity * shards  # lists of one query to those of the next
    p_list = p_lists + (i_b * Q + q0) * apart + shard * 2 * capacity

    n2 = tl.zeros([BQ, BD], tl.float64)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(p_query + q[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0).to(tl.float64)
        n2 += x * x
    own2 = tl.sum(n2, 1)
    theta = tl.where(real & (tl.abs(own2) < float("inf")), tl.full([BQ], NOBODY, tl.int64), TAKES_NOBODY)
    scale = scale_of(own2, METRIC)
    down = tl.where(scale > 18446744073709551616.0, 5.421010862427522e-20, 1.0)  # 2^-64: one factor alone might underflow
    rest = (1 / (scale * down)).to(tl.float32)
    error = (2 * wide(D) + 16).to(tl.float32) / 16777216

    size = tl.zeros([BQ], tl.int32)
    side = tl.zeros([], tl.int64)  # which of the two lists
    for r0 in range(begin, tl.maximum(end, begin + 1), BN):
        r = r0 + tl.arange(0, BN)
        ok = r < end
        total = tl.zeros([BQ, BN, BD], tl.float32)
        norm2 = tl.zeros([BN, BD], tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = tl.load(p_query + q[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0).to(tl.float32)
            k = tl.load(p_keys + r[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0).to(tl.float32)
            if METRIC == L2:
                t = x[:, None, :] - k[None, :, :]
                total += t * t
            else:
                x = x * down[:, None] * rest[:, None]
                total += x[:, None, :] * k[None, :, :]
                norm2 += k * k
        s = score(tl.sum(total, 2), tl.sum(norm2, 1)[None, :], error, METRIC)
        candidates = pack(s, r[None, :])
        take = ok[None, :] & (candidates < theta[:, None])
        t = take.to(tl.int32)
        if tl.max(tl.max(t, 1), 0) > 0:
            place = size[:, None] + tl.cumsum(t, 1) - t
            tl.store(p_list + side * capacity + iq.to(tl.int64)[:, None] * apart + place, candidates, mask=take)
            size += tl.sum(t, 1)
        last = r0 + BN >= end
        if last | (tl.max(size, 0) > capacity - BN):
            tl.debug_barrier()
            for j in range(there):
                p = p_list + j * apart
                p_to, step = p + (1 - side) * capacity, tl.zeros([], tl.int64) + 1
                if last:
                    p_to, step = p_found + (i_b * Q + q0 + j) * keep * shards + shard, wide(shards)
                n = tl.sum(tl.where(iq == j, size, 0), 0)
                n, worst = cut(p + side * capacity, p_to, step, n, keep, BX, BY)
                size = tl.where(iq == j, n, size)
                theta = tl.where(iq == j, tl.minimum(theta, worst), theta)
            side = 1 - side
            tl.debug_barrier()


@triton.jit(do_not_specialize=["Q", "N", "D", "K", "shards", "keep", "capacity", "stride", "direct"])
def knn_search_fwd_kernel_finish(
    p_query, p_keys, p_count, p_found, p_lists, p_distances, p_indices, p_kept, p_near, Q, N, D, K, shards, keep, capacity, stride, direct,
    METRIC: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """A query's K nearest by (distance, index) from what the scan found; direct: from all rows. p_near: the distances before they are rounded to their type.

    p_lists [A, Q, 2, capacity]: two lists, cut from the one into the other.
    """
    item = tl.program_id(0).to(tl.int64)
    i_b = item // Q
    rows = rows_of(p_count, i_b, N)
    p_query += i_b * stride + item % Q * D
    p_keys += i_b * N * D
    p_list = p_lists + item * 2 * capacity
    own2, lost = squared_length(p_query, D, BD)

    side, size, theta = tl.zeros([], tl.int64), tl.zeros([], tl.int32), tl.zeros([], tl.int64) + NOBODY
    others = -float("inf")  # the least score of a row that is not among the candidates
    more = (lost == 0) & (direct == 0)
    at, quiet, total = tl.zeros([], tl.int64), tl.zeros([], tl.int32), wide(keep) * shards
    while more:
        i = at + tl.arange(0, BL)
        before = size
        size = offer(p_list + side * capacity, tl.load(p_found + item * total + i, mask=i < total, other=NOBODY), theta, size)
        quiet = tl.where(size > before, 0, quiet + BL)  # candidates in a row that were not taken: a shard's are ascending
        at += BL
        more = (at < total) & (quiet < shards)
        if (more == 0) | (size > capacity - BL):
            tl.debug_barrier()
            size, theta = cut(p_list + side * capacity, p_list + (1 - side) * capacity, 1, size, keep, BX, BY)
            others = score_of(theta)
            side = 1 - side
            tl.debug_barrier()

    listed = direct == 0  # the candidates' distances; then, if they are not sure, those of all rows
    turns = (lost == 0).to(tl.int32)
    while turns > 0:
        turns -= 1
        some = tl.where(listed, size.to(tl.int64), rows)
        p_rows = p_list + side * capacity
        side = 1 - side
        size, theta = tl.zeros([], tl.int32), tl.zeros([], tl.int64) + NOBODY
        for r0 in range(0, some, BR):
            r = r0 + tl.arange(0, BR)
            ok = r < some
            if listed:
                r = row_of(tl.load(p_rows + r, mask=ok, other=0))
            d, _n2 = exact(p_query, own2, p_keys, r, ok, D, METRIC, BR, BD)
            size = offer(p_list + side * capacity, tl.where(ok, pack(d, r), NOBODY), theta, size)
            if (r0 + BR >= some) | (size > capacity - BR):
                tl.debug_barrier()
                size, theta = cut(p_list + side * capacity, p_list + (1 - side) * capacity, 1, size, K, BX, BY)
                side = 1 - side
                tl.debug_barrier()
        if listed:
            if rows > some:
                if (score_of(theta) < lower_bound(others, D, scale_of(own2, METRIC), METRIC)) == 0:
                    turns = 1
            listed = direct != 0
    for k0 in range(0, K, BL):
        k = k0 + tl.arange(0, BL)
        x = tl.load(p_list + side * capacity + k, mask=k < size, other=0)
        d = tl.where(k < size, score_of(x), float("inf"))
        d = tl.where(lost != 0, float("nan"), d)
        r = tl.where(k < size, row_of(x), -1)
        to = item * K + k
        tl.store(p_indices + to, r, mask=k < K)
        tl.store(p_kept + to, r, mask=k < K)
        tl.store(p_near + to, d, mask=k < K)
        tl.store(p_distances + to, d.to(p_distances.dtype.element_ty), mask=k < K)


# Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def weigh(d, delta_bits, KERNEL: tl.constexpr):
    """Kernels of distances d [BK] over their sum in float64, 0 where d is not finite. The nearest distance is a factor of all, which keeps them in range."""
    finite = tl.abs(d) < float("inf")
    nearest = tl.min(tl.where(finite, d, float("inf")), 0)
    nearest = tl.where(nearest < float("inf"), nearest, 0.0).to(tl.float64)
    x = tl.where(finite, d, 0.0).to(tl.float64)
    delta = delta_of(delta_bits)
    if KERNEL == INVERSE_DISTANCE:
        w = (nearest + delta) / (x + delta)
    elif KERNEL == SOFTMAX:
        w = tl.exp(((nearest - x) / delta).to(tl.float32)).to(tl.float64)
    else:
        w = x * 0 + 1
    w = tl.where(finite, w, 0.0)
    total = tl.sum(w, 0)
    return w / tl.where(total == 0, 1.0, total)


@triton.jit
def delta_of(bits):
    """The double with these bits: a launch has no argument of that type."""
    return wide(bits).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["span", "Q", "N", "K", "D", "V", "stride", "delta_bits"])
def knn_search_bwd_kernel_slopes(
    p_grad_output, p_grad_weights, p_grad_distances, p_indices, p_query, p_keys, p_values, p_to_query, p_to_key, p_weight, p_dquery,
    span, Q, N, K, D, V, stride, delta_bits,
    METRIC: tl.constexpr, KERNEL: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq of one query, and of its neighbours what their rows' gradients are made of: dkey = to_query * query - to_key * key (l2:
    to_query * (query - key)), dvalue = weight * grad_output. A query of `span` dictionaries sums over them in order.
    """
    i = tl.program_id(0).to(tl.int64)
    q, first = i % Q, i // Q
    last = first + span
    p_query += first * stride + q * D
    own2, _bad = squared_length(p_query, D, BD)
    length, _square, single, small = norm_of(own2)
    k = tl.arange(0, BK)
    own = tl.zeros([], tl.float64)  # cosine: the query's gradient has this much of the query
    for i_b in range(first, last):
        item = i_b * Q + q
        row = tl.load(p_indices + item * K + k, mask=k < K, other=-1)
        found = row >= 0
        d, norm2 = exact(p_query, own2, p_keys + i_b * N * D, row, found, D, METRIC, BK, BD)
        on = found & (d < float("inf"))
        slope = tl.zeros([BK], tl.float64)
        if p_grad_distances is not None:
            slope = tl.load(p_grad_distances + item * K + k, mask=on, other=0).to(tl.float64)
        if KERNEL != ALONE:
            w = weigh(tl.where(on, d, float("inf")), delta_bits, KERNEL)
            tl.store(p_weight + item * K + k, w.to(tl.float32), mask=k < K)
            towards = tl.zeros([BK], tl.float64)
            if p_grad_output is not None:
                total = tl.zeros([BK, BD], tl.float64)
                for v0 in range(0, V, BD):
                    v = v0 + tl.arange(0, BD)
                    g = tl.load(p_grad_output + item * V + v, mask=v < V, other=0).to(tl.float64)
                    value = tl.load(p_values + (i_b * N + row)[:, None] * V + v[None, :], mask=on[:, None] & (v < V)[None, :], other=0)
                    total += g[None, :] * value.to(tl.float64)
                towards = tl.sum(total, 1)
            if p_grad_weights is not None:
                towards += tl.load(p_grad_weights + item * K + k, mask=on, other=0).to(tl.float64)
            mean = tl.sum(tl.where(on, w * towards, 0.0), 0)
            delta = delta_of(delta_bits)
            if KERNEL == INVERSE_DISTANCE:
                slope -= tl.where(w != 0, w * (towards - mean) / (tl.where(on, d, 0.0).to(tl.float64) + delta), 0.0)
            elif KERNEL == SOFTMAX:
                slope -= tl.where(w != 0, w * (towards - mean) / delta, 0.0)
        to_key = tl.zeros([BK], tl.float64)
        if METRIC == L2:
            to_query = -2 * slope
        elif METRIC == COSINE:
            length_k, _square_k, single_k, small_k = norm_of(norm2)
            moves = on & (d > 0) & (tl.minimum(single, single_k) > 0)
            slope = tl.where(moves, slope, 0.0)
            cosine = 1 - tl.where(moves, d, 0.0).to(tl.float64)
            to_query = tl.where(moves, -slope / length / length_k, 0.0)
            to_key = tl.where(moves & (small_k == 0), -slope * cosine / length_k / length_k, 0.0)
            part = tl.sum(slope * cosine, 0)
            if (part != 0) & (small == 0):
                own += part / length / length
        else:
            to_query = -slope
        tl.store(p_to_query + item * K + k, to_query.to(tl.float32), mask=k < K)
        tl.store(p_to_key + item * K + k, to_key.to(tl.float32), mask=k < K)
    tl.debug_barrier()
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(p_query + d, mask=d < D, other=0).to(tl.float32)
        total = tl.zeros([BK, BD], tl.float32)
        for i_b in range(first, last):
            item = i_b * Q + q
            c = tl.load(p_to_query + item * K + k, mask=k < K, other=0)
            row = tl.load(p_indices + item * K + k, mask=k < K, other=-1)
            key = tl.load(p_keys + (i_b * N + row)[:, None] * D + d[None, :], mask=(c != 0)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
            if METRIC == L2:
                key -= x[None, :]
            total += tl.where((c != 0)[:, None], c[:, None] * key, 0.0)
        dq = tl.sum(total, 0)
        dq = tl.where(own != 0, dq + (own * x.to(tl.float64)).to(tl.float32), dq)
        tl.store(p_dquery + (first * Q + q) * D + d, dq.to(p_dquery.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["programs", "Q", "N", "K", "D", "V", "stride", "stacked"])
def knn_search_bwd_kernel_scatter(
    p_sorted, p_places, p_query, p_keys, p_grad_output, p_to_query, p_to_key, p_weight, p_dkeys, p_dvalues, p_rows,
    programs, Q, N, K, D, V, stride, stacked, METRIC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What all neighbours at one row say of it, in the order of the queries, by the program of the first of them.

    With p_rows [2 (stacked) or 1, programs] gradients have a row for each neighbour: p_rows says of which key, all but the first of a key hold zeros.
    """
    i = tl.program_id(0).to(tl.int64)
    pairs = wide(Q) * K
    i_b, begin = i // pairs, i % pairs
    p_sorted += i_b * pairs
    p_places += i_b * pairs
    row = tl.load(p_sorted + begin)
    before = tl.load(p_sorted + begin - 1, mask=begin > 0, other=-1)
    first = (row >= 0) & (row != before)
    start = tl.where(first, row, -2)
    writes, to = first, i_b * N + row
    if p_rows is not None:
        writes, to = first | True, i
        if row < 0:
            row = tl.maximum(tl.load(p_sorted + pairs - 1), 0)  # one that is there anyway
        tl.store(p_rows + wide(stacked) * programs + i, row)
        if stacked != 0:
            tl.store(p_rows + i, i_b)
    if writes:
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            key = tl.load(p_keys + (i_b * N + row) * D + d, mask=d < D, other=0).to(tl.float32)
            total = tl.zeros([BD], tl.float32)
            at, same = begin, start
            while same == row:
                place = tl.load(p_places + at)
                x, y = tl.load(p_to_query + i_b * pairs + place), tl.load(p_to_key + i_b * pairs + place)
                if x != 0:
                    q = tl.load(p_query + i_b * stride + place // K * D + d, mask=d < D, other=0).to(tl.float32)
                    if METRIC == L2:
                        total += x * (q - key)
                    else:
                        total += x * q - y * key
                at += 1
                same = tl.load(p_sorted + at, mask=at < pairs, other=-1)
            tl.store(p_dkeys + to * D + d, total.to(p_dkeys.dtype.element_ty), mask=d < D)
        if p_dvalues is not None:
            for v0 in range(0, V, BD):
                v = v0 + tl.arange(0, BD)
                total = tl.zeros([BD], tl.float32)
                at, same = begin, start
                while same == row:
                    place = tl.load(p_places + at)
                    w = tl.load(p_weight + i_b * pairs + place)
                    if w != 0:
                        total += w * tl.load(p_grad_output + (i_b * Q + place // K) * V + v, mask=v < V, other=0).to(tl.float32)
                    at += 1
                    same = tl.load(p_sorted + at, mask=at < pairs, other=-1)
                tl.store(p_dvalues + to * V + v, total.to(p_dvalues.dtype.element_ty), mask=v < V)


# Host -----------------------------------------------------------------------------------------------------------------


def shapes(query: Tensor, keys: Tensor) -> tuple[int, int, int, int, int, tuple[int, ...]]:
    """A, Q, N, D, elements from one dictionary's queries to the next (0: shared), and how outputs begin."""
    A = keys.shape[0] if keys.dim() == 3 else 1
    Q, D = query.shape[-2:]
    return A, Q, keys.shape[-2], D, Q * D if query.dim() == 3 else 0, (*keys.shape[:-2], Q)


def search(query: Tensor, keys: Tensor, count: Tensor | None, K: int, metric: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances, indices, the indices again, and the distances in float32; of contiguous tensors."""
    A, Q, N, D, stride, lead = shapes(query, keys)
    distances = query.new_empty(*lead, K)
    indices = query.new_empty(*lead, K, dtype=torch.int64)
    kept, near = torch.empty_like(indices), workspace(query, *lead, K)
    if K == 0:
        return distances, indices, kept, near
    slack = sizes.slack
    keep = K + max(slack, K // 4)
    BX, BY = min(64, sizes.row), 16
    BL = min(128, sizes.row)
    BR = min(64, sizes.row)
    direct = N <= keep
    shards, found = 1, indices  # direct: nothing of the scan is read
    if not direct:
        BQ = 4 if Q <= 4 else 8
        BN = max(1, sizes.search // BQ)
        tiles = triton.cdiv(Q, BQ)
        shards = max(1, min(triton.cdiv(N, max(BN, 4 * keep)), triton.cdiv(BLOCKS, A * tiles))) if A * tiles else 1
        capacity = power(keep + BN)
        lists = query.new_empty(A, Q, shards, 2, capacity, dtype=torch.int64)
        found = query.new_empty(A, Q, keep, shards, dtype=torch.int64)
        args = query, keys, count, lists, found, Q, N, D, tiles, shards, keep, capacity, stride
        blocks = {"BQ": BQ, "BN": BN, "BD": CHUNK, "BX": BX, "BY": BY}
        launch(knn_search_fwd_kernel_scan, A * tiles * shards, *args, num_warps=4, all_registers=True, METRIC=metric, **blocks)
    capacity = power(keep + max(BL, BR))
    lists = query.new_empty(A, Q, 2, capacity, dtype=torch.int64)
    args = query, keys, count, found, lists, distances, indices, kept, near, Q, N, D, K, shards, keep, capacity, stride, int(direct)
    blocks = {"BL": BL, "BR": BR, "BD": CHUNK, "BX": BX, "BY": BY}
    launch(knn_search_fwd_kernel_finish, A * Q, *args, num_warps=4, all_registers=True, METRIC=metric, **blocks)
    return distances, indices, kept, near


def gradients(
    grad_output: Tensor | None, grad_weights: Tensor | None, grad_distances: Tensor | None, indices: Tensor, query: Tensor, keys: Tensor,
    values: Tensor | None, metric: int, kernel: int, delta_bits: int, sparse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dquery, dkeys, dvalues (empty without values, when `kernel` is ALONE), and with `sparse` whose rows the latter two hold, else nothing.

    Sparse ones have as many rows as there are neighbours, some of them repeated with zeros, so that no size depends on what was found.
    """
    tensors = grad_output, grad_weights, grad_distances, indices, query, keys, values
    grad_output, grad_weights, grad_distances, indices, query, keys, values = (t if t is None else t.contiguous() for t in tensors)
    A, Q, N, D, stride, _ = shapes(query, keys)
    K, V = indices.shape[-1], 0 if values is None else values.shape[-1]
    programs = A * Q * K if N or not sparse else 0
    rows = indices.new_empty(keys.dim() - 1, programs if sparse else 0)
    dquery = torch.empty_like(query)
    dkeys = keys.new_empty(programs, D) if sparse else torch.zeros_like(keys)
    dvalues = keys.new_empty(0) if values is None else values.new_zeros(programs, V) if sparse else torch.zeros_like(values)
    order, places = indices.view(A, Q * K).sort(dim=-1, stable=True)
    to_query, to_key, weight = (workspace(query, A, Q, K) for _ in range(3))
    BK = max(64, power(K))
    shared = query.dim() < keys.dim()  # one query of all dictionaries is one program's
    args = grad_output, grad_weights, grad_distances, indices, query, keys, values, to_query, to_key, weight, dquery
    args += A if shared else 1, Q, N, K, D, V, stride, delta_bits
    blocks = {"METRIC": metric, "KERNEL": kernel, "BK": BK, "BD": max(2, min(CHUNK, 2048 // BK))}
    launch(knn_search_bwd_kernel_slopes, Q if shared else A * Q, *args, num_warps=8 if BK > 256 else 4, all_registers=True, **blocks)
    args = order, places, query, keys, grad_output, to_query, to_key, weight, dkeys, None if values is None or grad_output is None else dvalues
    args += rows if sparse else None, programs, Q, N, K, D, V, stride, int(keys.dim() == 3)
    launch(knn_search_bwd_kernel_scatter, programs, *args, num_warps=1, METRIC=metric, BD=32)
    return dquery, dkeys, dvalues, rows


def knn_search_fwd(
    query: Tensor, keys: Tensor, count: Tensor | None, norms: Tensor | None, mirror: Tensor | None, rounding: Tensor | None, k: int, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    """memcore::knn_search_fwd."""
    query, keys, count = (t if t is None else t.contiguous() for t in (query, keys, count))
    return search(query, keys, count, k, metric)[:3]


def knn_search_bwd(
    grad: Tensor | None, grad_indices: Tensor | None, indices: Tensor, query: Tensor, keys: Tensor, count: Tensor | None,
    norms: Tensor | None, mirror: Tensor | None, rounding: Tensor | None, k: int, metric: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """memcore::knn_search_bwd."""
    return gradients(None, None, grad, indices, query, keys, None, metric, ALONE.value, 0)[:2]


def knn_search_rows(grad: Tensor | None, indices: Tensor, query: Tensor, keys: Tensor, metric: int) -> tuple[Tensor, Tensor, Tensor]:
    """memcore::knn_search_rows."""
    dquery, dkeys, _, rows = gradients(None, None, grad, indices, query, keys, None, metric, ALONE.value, 0, sparse=True)
    return dquery, rows, dkeys
