"""Nearest neighbours in plain PyTorch."""

import torch
from torch import Tensor

from .._op import accumulate, no_autocast

__all__ = ["Neighbours", "as_count", "knn_search"]

EPS = 1e-8
_CHUNK = 1 << 24  # differences held at a time


def _wide(t: Tensor) -> Tensor:
    """Distances are summed in float64 and rounded once, so that every backend finds the same neighbours."""
    return t.float() if t.device.type == "mps" else t.double()


def _unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x / max(|x|, eps), its squared length (NaN if that of x overflows), and where x counts as zero."""
    n2 = x.square().sum(-1, keepdim=True)
    zero = n2.to(dtype) == 0
    norm = torch.where(zero, 1, n2).sqrt()
    unit = torch.where(zero, 0, x / norm.clamp_min(EPS))
    return unit, torch.where(norm < EPS, n2 / EPS**2, 1 + (n2 - n2)).squeeze(-1), zero.squeeze(-1)


def _distance(q: Tensor, k: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    """Distances of q [..., D] and k [..., D], broadcast, rounded to `dtype`."""
    if metric == "l2":
        d = (q - k).square().sum(-1)
    elif metric == "ip":
        d = -(q * k).sum(-1)
    else:
        u, u2, no_u = _unit(q, dtype)
        v, v2, no_v = _unit(k, dtype)
        half = 0.5 * (u - v).square().sum(-1) + (1 - 0.5 * (u2 + v2))
        half = torch.where(half < 1e-30, half - half.detach(), half)  # rounding of parallel vectors, which have derivatives
        d = torch.where(no_u | no_v, 1 + 0 * (u2 + v2), half)
    return d.to(dtype)


@torch.no_grad()
def _search(query: Tensor, keys: Tensor, k: int, metric: str, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices [A, Q, K] of the nearest, -1 where there is none, and whether their distance is finite."""
    A, N, D = keys.shape
    dtype = accumulate(query).dtype
    q, every = _wide(query)[:, :, None], _wide(keys)[:, None]

    def distances(q, keys):
        d = _distance(q, keys, metric, dtype)
        return torch.where(d.isfinite(), d, torch.inf)

    if torch.compiler.is_compiling() or keys.numel() == 0:
        d = distances(q, every)
    else:
        rows = max(1, min(N, _CHUNK // (A * D)))
        few = max(1, _CHUNK // (A * D * rows))
        d = torch.cat([torch.cat([distances(some, part) for part in every.split(rows, 2)], -1) for some in q.split(few, 1)], 1)
    if count is not None:
        d = torch.where(torch.arange(N, device=d.device) < count[:, None, None], d, torch.inf)
    n = N if count is None else count.clamp(0, N)[:, None, None]
    d, order = torch.nn.functional.pad(d, (0, k), value=torch.inf).sort(dim=-1, stable=True)
    lost = ~query.isfinite().all(-1, keepdim=True)
    return torch.where(lost | (order[..., :k] >= n), -1, order[..., :k]), d[..., :k].isfinite() & ~lost


class _SparseRows(torch.autograd.Function):
    """What `_rows` takes, with a gradient that holds these rows alone."""

    @staticmethod
    def forward(ctx, t, indices):
        ctx.shape = t.shape
        ctx.save_for_backward(indices)
        return _rows(t, indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        at = (indices >= 0).nonzero(as_tuple=True)
        place = torch.stack([*([at[0]] if len(ctx.shape) == 3 else []), indices[at]])
        return torch.sparse_coo_tensor(place, grad[at], ctx.shape, check_invariants=False), None


def _rows(t: Tensor, indices: Tensor) -> Tensor:
    """[A, Q, K, F]: rows of t [A, N, F] or [N, F]."""
    i = indices.clamp_min(0)
    return t[i] if t.dim() == 2 else t[torch.arange(t.shape[0], device=t.device)[:, None, None], i]


class Neighbours:
    """The K nearest of each query, with a leading A."""

    def __init__(self, query: Tensor, keys: Tensor, k: int, metric: str, count: Tensor | None, sparse: bool) -> None:
        self.stacked = keys.dim() == 3
        self.query_dtype, self.sparse = query.dtype, sparse
        dtype = accumulate(query).dtype
        query = query if query.dim() == 3 else query[None]
        self.indices, self.finite = _search(query.detach(), keys.detach() if self.stacked else keys.detach()[None], k, metric, count)
        self.lost = ~query.detach().isfinite().all(-1, keepdim=True)  # [A, Q, 1]
        q = torch.where(self.lost, 0, _wide(query))[:, :, None]
        self.near = torch.where(self.finite, _distance(q, self.rows(keys), metric, dtype), 0)
        self.distances = torch.where(self.finite, self.near, torch.where(self.lost, torch.nan, torch.inf))

    def rows(self, t: Tensor) -> Tensor:
        """t at the neighbours, [A, Q, K, F] in wide precision; zeros where none is at a finite distance."""
        if t.shape[-2] == 0:
            return _wide(t.new_zeros(*self.indices.shape, t.shape[-1]) + t.sum())
        found = _SparseRows.apply(t, self.indices) if self.sparse else _rows(t, self.indices)
        return torch.where(self.finite[..., None], _wide(found), 0)

    def out(self, t: Tensor) -> Tensor:
        t = t if t.dtype == torch.int64 else t.to(self.query_dtype)
        return t if self.stacked else t.squeeze(0)


def as_count(count: Tensor | int | None, keys: Tensor) -> Tensor | None:
    """[A] valid rows of each dictionary."""
    if count is None:
        return None
    if not isinstance(count, Tensor):
        count = torch.full((), count, dtype=torch.int64, device=keys.device)
    return count.to(torch.int64).expand(keys.shape[0] if keys.dim() == 3 else 1)


def knn_search(
    query: Tensor, keys: Tensor, k: int, *, metric: str = "l2", count: Tensor | int | None = None, sparse: bool = False
) -> tuple[Tensor, Tensor]:
    """(distances, indices) of the k nearest keys by (distance, index); see memcore.functional.knn_search."""
    with no_autocast(query):
        found = Neighbours(query, keys, k, metric, as_count(count, keys), sparse)
        return found.out(found.distances), found.out(found.indices)
