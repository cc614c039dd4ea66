"""How entries of a store come, are used and go, in tensors."""

from collections import Counter

import torch
from torch import Tensor

from .. import _checks
from . import _table
from ._rings import drop_rows

__all__ = ["WRITTEN", "Changes"]

WRITTEN = ("updated", "appended", "replaced", "rejected")


class Changes:
    """Part of DND."""

    def _touch(self, indices: Tensor, which: Tensor | None) -> None:
        with self._lock:
            if self._rings.stamps is not None:
                self._stamp(indices, which)
            elif which is None and self._direct:
                indices = indices.contiguous()
                self._table.touch_at(0, indices.data_ptr(), *indices.shape)
            else:
                owners = range(self.dictionaries) if which is None else which.tolist()
                for a, slots in zip(owners, indices.flip(-1).cpu().numpy(), strict=True):
                    self._table.touch(a, slots.reshape(-1))

    def _stamp(self, indices: Tensor, which: Tensor | None) -> None:
        """The same on the device: later uses get higher stamps."""
        n = indices.numel() // max(1, indices.shape[0]) if which is None else indices.numel()
        order = torch.arange(n, device=self.device).view(*(indices.shape[1:] if which is None else indices.shape))
        stamps = (self._clock + 1 + order.flip(-1) if order.numel() else order).expand_as(indices)
        owner = torch.arange(self.dictionaries, device=self.device)[:, None, None] if which is None else which.to(self.device)[:, None]
        rows = owner * self.capacity + indices.clamp_min(0)
        self._rings.stamps.scatter_reduce_(0, rows.reshape(-1), torch.where(indices < 0, 0, stamps).reshape(-1), "amax")
        self._clock += n

    def _fetch_oldest(self, dictionaries: Tensor) -> None:
        """Tell the table which entries a batch of writes would replace, where the device knows the order of use."""
        if self._rings.stamps is None:
            return
        new = torch.bincount(dictionaries, minlength=self.dictionaries).tolist()
        for a, n in enumerate(new):
            size = self._table.size(a)
            if n and size + n > self.capacity:
                stamps = self._rings.stamps[a * self.capacity : a * self.capacity + size]
                self._table.oldest(a, stamps.topk(min(n, size), largest=False).indices.cpu().numpy())

    def _entries(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Checked keys [n, D] and values [n, V] of the store's dtype."""
        op = "DND.write"
        if isinstance(values, (int, float)) and not isinstance(values, bool):
            values = torch.tensor([float(values)], dtype=self.dtype)
        for name, t in (("keys", keys), ("values", values)):
            if not isinstance(t, Tensor):
                raise TypeError(f"memcore.{op}: {name!r} must be a tensor, got {type(t).__name__}")
            if not t.is_floating_point():
                raise TypeError(f"memcore.{op}: {name!r} must be floating, got {t.dtype}")
        D, V = self.key_width, self.value_width
        rows = keys[None] if keys.dim() == 1 else keys
        if rows.dim() != 2 or rows.shape[1] != D:
            raise ValueError(f"memcore.{op}: 'keys' must have shape (n, D) or (D) with D = {D}, got {tuple(keys.shape)}")
        n = rows.shape[0]
        if values.shape not in ((n, V), *(((n,),) if V == 1 else ()), *(((V,), ()) if n == 1 and (V == 1 or values.dim() == 1) else ())):
            raise ValueError(f"memcore.{op}: 'values' must have shape (n, V) = ({n}, {V}) to match 'keys' {tuple(keys.shape)}, got {tuple(values.shape)}")
        place = {"device": self.device, "dtype": self.dtype}
        return rows.detach().to(**place).contiguous(), values.detach().to(**place).reshape(n, V).contiguous()

    def _which(self, op: str, dictionary: int | Tensor, n: int) -> Tensor:
        """[n] dictionaries, on the host."""
        A = self.dictionaries
        if isinstance(dictionary, Tensor):
            if dictionary.dtype != torch.int64:
                raise TypeError(f"memcore.DND.{op}: 'dictionary' must be an int or an int64 tensor, got {dictionary.dtype}")
            if dictionary.shape not in ((), (n,)):
                raise ValueError(f"memcore.DND.{op}: 'dictionary' must have shape ({n},), got {tuple(dictionary.shape)}")
            which = dictionary.detach().cpu().expand(n).contiguous()
        else:
            _checks.whole(f"DND.{op}", "dictionary", dictionary, 0)
            if dictionary >= A:
                raise ValueError(f"memcore.DND.{op}: 'dictionary' must be less than {A}, got {dictionary}")
            which = torch.full((n,), dictionary)
        if n and not 0 <= int(which.min()) <= int(which.max()) < A:
            raise ValueError(f"memcore.DND.{op}: 'dictionary' must be 0..{A - 1}, got {which.min()}..{which.max()}")
        return which

    @torch.no_grad()
    def _write_rows(self, keys: Tensor, values: Tensor, hashes: Tensor | None, which: Tensor) -> Tensor:
        """What the compiled table does itself, in tensors: [n, 2] slots and kinds."""
        r, n = self._rings, keys.shape[0]
        hashes = _table.hash_rows(keys) if hashes is None else hashes
        good = (keys.isfinite().all(1) & values.isfinite().all(1)).cpu().nonzero().squeeze(1)
        placed = torch.tensor([[-1, _table.REJECTED]]).repeat(n, 1)
        self._fetch_oldest(which[good])
        slots, kinds = self._table.put(which[good].numpy(), hashes[good].numpy())
        placed[good, 0], placed[good, 1] = torch.from_numpy(slots), torch.from_numpy(kinds).long()
        rows = which[good] * self.capacity + placed[good, 0]
        seen: Counter[int] = Counter()
        rounds: list[list[int]] = []  # entries that meet in one row go in different rounds
        for i, row in enumerate(rows.tolist()):
            if seen[row] == len(rounds):
                rounds.append([])
            rounds[seen[row]].append(i)
            seen[row] += 1
        with r.changing():
            for now in rounds:
                at, entry = rows[now].to(self.device), good[now].to(self.device)
                fresh = (placed[good[now], 1] != _table.UPDATED).to(self.device)
                old, new = r.flat_values[at].double(), values[entry].double()
                mixed = torch.where(fresh[:, None], new, (1 - self.alpha) * old + self.alpha * new)
                r.flat_values[at] = mixed.to(self.dtype)
                r.set_keys(at, keys[entry])
                r.clear_state(at[fresh])
            if r.stamps is not None:
                order = torch.arange(1, len(rows) + 1, device=self.device)
                r.stamps.scatter_reduce_(0, rows.to(self.device), self._clock + order, "amax")
                self._clock += len(rows)
            for a in which.unique().tolist():
                r.set_count(a, self._table.size(a))
        for kind, count in zip(WRITTEN, torch.bincount(placed[:, 1], minlength=4).tolist(), strict=True):
            self._counts[kind] += count
        return placed

    def _tell(self, keys: Tensor, hashes: Tensor | None, which: Tensor, placed: Tensor, pending: bool) -> None:
        """Those who need to know of written rows: gradients that wait, the searcher, the log."""
        stored = placed[:, 0] >= 0
        rows = which[stored] * self.capacity + placed[stored, 0]
        if pending:
            gone = rows[placed[stored, 1] != _table.UPDATED]
            drop_rows(self.keys, gone)
            drop_rows(self.values, gone)
        if self.searcher is not None:
            self.searcher.changed(rows)
        if self._log is not None:
            identity = _table.hash_rows(keys) if hashes is None else hashes
            self._log.put(rows, identity[stored])

    @torch.no_grad()
    def _delete(self, a: int, hash: int) -> bool:
        r = self._rings
        with r.changing():
            slot, moved = self._table.remove(a, hash)
            if slot < 0:
                return False
            to, source = a * self.capacity + slot, a * self.capacity + moved
            if moved != slot:
                r.move(source, to)
            r.set_count(a, self._table.size(a))
        rows = torch.tensor([to, source])
        drop_rows(self.keys, rows)
        drop_rows(self.values, rows)
        if self.searcher is not None:
            self.searcher.changed(rows)
        if self._log is not None:
            self._log.delete(a, hash)
        return True
