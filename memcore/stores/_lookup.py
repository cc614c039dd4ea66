"""How a store finds and reads the neighbours of queries."""

from typing import Any

import torch
from torch import Tensor

from ..functional import KnnCache, KnnLookup, knn_lookup, knn_search
from ..kernels.knn_lookup.op import KERNELS, METRICS, checked_lookup

__all__ = ["Lookup"]


class Lookup:
    """Part of DND."""

    @property
    def _cache(self) -> KnnCache:
        r = self._rings
        return KnnCache(r.norms, r.mirror, r.rounding)

    def _find(self, query: Tensor, k: int, which: Tensor | None) -> KnnLookup:
        r = self._rings
        if which is None and self.searcher is None and query.dtype is self.dtype and query.device == r.keys.device:
            kinds = METRICS.index(self.metric), KERNELS.index(self.kernel), float(self.delta)
            return checked_lookup((query, r.keys, r.values, r.count, r.norms, r.mirror, r.rounding, k, *kinds), True)
        options = {"kernel": self.kernel, "delta": self.delta, "metric": self.metric, "sparse": True}
        if which is None and self.searcher is None:
            return knn_lookup(query, r.keys, r.values, k, count=r.count, cache=self._cache, **options)
        if which is not None:
            slots = self._slots_of_own(query.detach(), k, which)[:, None]  # [Q, 1, C]
            owner, query = which.to(self.device), query[:, None]
        else:
            slots = self.searcher.candidates(query.detach(), k)  # [A, Q, C]
            owner = torch.arange(self.dictionaries, device=self.device)
            query = query if query.dim() == 3 else query.expand(self.dictionaries, *query.shape)
        if self.searcher is not None:
            slots = self._nearest(query.detach(), slots, owner, k)
        found = self._read(query, slots, owner, options)
        return found if which is None else KnnLookup(*(t.squeeze(1) for t in found))

    def _slots_of_own(self, query: Tensor, k: int, which: Tensor) -> Tensor:
        """[Q, C] candidates of queries that ask one dictionary each."""
        r = self._rings
        A, Q = self.dictionaries, query.shape[0]
        if self.device.type != "cpu":  # grouping them would wait for the device
            stacked, place = query, torch.arange(Q, device=self.device)
        else:
            order = which.argsort(stable=True)
            sizes = torch.bincount(which, minlength=A)
            place = torch.empty_like(order)
            place[order] = torch.arange(Q) - (sizes.cumsum(0) - sizes)[which[order]]
            stacked = query.new_full((A, int(sizes.max()) if Q else 0, self.key_width), torch.nan)  # NaN queries search nothing
            stacked[which, place] = query
        if self.searcher is not None:
            found = self.searcher.candidates(stacked, k)
        else:
            with torch.no_grad():
                found = knn_search(stacked, r.keys, k, metric=self.metric, count=r.count, cache=self._cache)[1]
        return found[which.to(self.device), place]

    def _rows_of(self, slots: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots [P, Q, C] ascending, as the lowest wins ties, those that are none (-1) last; their rows [P * Q, C]; how many there are [P * Q]."""
        slots = torch.where(slots < 0, self.capacity, slots).sort(-1).values
        none = slots == self.capacity
        rows = torch.where(none, -1, owner[:, None, None] * self.capacity + slots)
        return torch.where(none, -1, slots).flatten(0, 1), rows.flatten(0, 1), (~none).sum(-1).flatten()

    @torch.no_grad()
    def _nearest(self, query: Tensor, slots: Tensor, owner: Tensor, k: int) -> Tensor:
        """The k nearest [P, Q, K] of candidates [P, Q, C] by true distance; query [P, Q, D], owner [P] their dictionary."""
        slots, rows, valid = self._rows_of(slots, owner)
        keys = self._rings.flat_keys[rows.clamp_min(0)]
        found = knn_search(query.reshape(-1, 1, self.key_width), keys, k, metric=self.metric, count=valid)[1].squeeze(1)
        found = torch.where(found < 0, -1, slots.gather(-1, found.clamp_min(0))) if slots.shape[1] else found
        return found.reshape(*query.shape[:2], k)

    def _read(self, query: Tensor, slots: Tensor, owner: Tensor, options: dict[str, Any]) -> KnnLookup:
        """The read of these neighbours [P, Q, K]."""
        P, Q, K = slots.shape
        slots, rows, valid = self._rows_of(slots, owner)
        keys, values = _Gather.apply(self.keys, rows), _Gather.apply(self.values, rows)
        found = knn_lookup(query.reshape(P * Q, 1, -1), keys, values, K, count=valid, **{**options, "sparse": False})
        at = found.indices.squeeze(1)
        at = torch.where(at < 0, -1, slots.gather(-1, at.clamp_min(0)))
        return KnnLookup(*(t.reshape(P, Q, t.shape[-1]) for t in found._replace(indices=at)))


class _Gather(torch.autograd.Function):
    """Rows [..] of a ring [A, N, W], zeros for -1; the gradient holds these rows alone."""

    @staticmethod
    def forward(ctx: Any, ring: Tensor, rows: Tensor) -> Tensor:
        ctx.shape = ring.shape
        ctx.save_for_backward(rows)
        return torch.where(rows[..., None] < 0, 0, ring.flatten(0, 1)[rows.clamp_min(0)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        used, N = rows >= 0, ctx.shape[1]
        rows = rows[used]
        return torch.sparse_coo_tensor(torch.stack([rows // N, rows % N]), grad[used], ctx.shape, check_invariants=False), None
