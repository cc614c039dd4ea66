"""A store's content and settings as plain tensors and data, and what another process gets of it."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ._optimizers import OPTIMIZERS
from ._rings import RINGS

__all__ = ["State"]


class State:
    """Part of DND."""

    def config(self) -> dict[str, Any]:
        """The arguments it was made with, device and searcher apart, as plain data."""
        optimizer = None
        if self.optimizer is not None:
            name = next(n for n, kind in OPTIMIZERS.items() if isinstance(self.optimizer, kind))
            optimizer = {"name": name, **asdict(self.optimizer)}
        plain = ("dictionaries", "capacity", "key_width", "value_width", "neighbours", "kernel", "delta", "metric", "alpha", "grad_keys", "bf16")
        return {**{name: getattr(self, name) for name in plain}, "dtype": str(self.dtype)[6:], "optimizer": optimizer}

    @classmethod
    def from_config(cls, config: dict[str, Any], **more: Any) -> "State":
        """An empty store of a `config()`."""
        given = dict(config)
        optimizer = given.pop("optimizer")
        if optimizer is not None:
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in optimizer.items() if k != "name"}
            optimizer = OPTIMIZERS[optimizer["name"]](**settings)
        return cls(**{**given, "dtype": getattr(torch, given["dtype"]), "optimizer": optimizer, **more})

    def _taken(self) -> Tensor:
        """Rows that hold entries, dictionary by dictionary."""
        return torch.cat([a * self.capacity + torch.arange(n) for a, n in enumerate(self.counts)])

    def state_dict(self) -> dict[str, Tensor]:
        """Every entry with hash, place in the order of use and optimizer's state, copied to the host."""
        self._here("state_dict")
        r = self._rings
        with self._lock:
            counts = self.counts
            if r.stamps is not None:  # the device knows the order
                for a, n in enumerate(counts):
                    self._table.oldest(a, r.stamps[a * self.capacity : a * self.capacity + n].argsort().cpu().numpy())
            rows = self._taken().to(self.device)
            tables = [(torch.from_numpy(self._table.hashes(a)), torch.from_numpy(self._table.order(a))) for a in range(self.dictionaries)]
            state = {f"{ring}.{name}": t for ring in RINGS for name, t in r.state_of(ring, rows).items()}
            if r.steps is not None:
                state["steps"] = r.steps[rows]
            tensors = {"keys": r.flat_keys[rows], "values": r.flat_values[rows], **state}
            return {
                "counts": torch.tensor(counts, dtype=torch.int64),
                "hashes": torch.cat([t[0] for t in tables]),
                "order": torch.cat([t[1] for t in tables]),
                **{name: t.cpu() for name, t in tensors.items()},
            }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the content by that of a `state_dict` of a store of the same sizes and optimizer.

        Raises:
            ValueError: it does not fit. The store is as it was then.
        """
        self._here("load_state_dict")
        r, A, N = self._rings, self.dictionaries, self.capacity
        counts = state["counts"].tolist() if isinstance(state.get("counts"), Tensor) else []
        total = sum(counts)
        if len(counts) != A or not all(0 <= n <= N for n in counts):
            raise ValueError(f"memcore.DND.load_state_dict: 'counts' must be {A} numbers of 0..{N}, got {counts}")
        tensors = {"keys": r.flat_keys, "values": r.flat_values, **r.state_tensors(), **({} if r.steps is None else {"steps": r.steps})}
        want = {"hashes": (total,), "order": (total,), **{name: (total, t.shape[1]) for name, t in tensors.items()}}
        have = {name: tuple(t.shape) for name, t in state.items() if name != "counts"}
        for name in sorted(want.keys() | have.keys()):
            if want.get(name) != have.get(name):
                raise ValueError(
                    f"memcore.DND.load_state_dict: {name!r} must have shape {want.get(name, 'none (absent)')}, got {have.get(name, 'none (absent)')}"
                )
        parts = [(h.unique().numel() == n and s.sort().values.equal(torch.arange(n))) for n, h, s in self._split(state, counts)]
        if not all(parts) or not all(state[name].isfinite().all() for name in ("keys", "values")):
            raise ValueError("memcore.DND.load_state_dict: 'hashes', 'order', 'keys' and 'values' must be those of distinct finite entries")
        with self._lock:
            self.clear()
            with r.changing():
                for a, (n, hashes, order) in enumerate(self._split(state, counts)):
                    self._table.put(torch.full((n,), a).numpy(), hashes.numpy())
                    self._table.oldest(a, order.numpy())
                    if r.stamps is not None:
                        r.stamps[a * N + order.to(self.device)] = self._clock + 1 + torch.arange(n, device=self.device)
                    r.set_count(a, n)
                self._clock += max(counts, default=0)
                rows = self._taken().to(self.device)
                r.set_keys(rows, state["keys"].to(self.device, self.dtype))
                for name, t in tensors.items():
                    if name != "keys":
                        t[rows] = state[name].to(self.device, t.dtype)
            if self.searcher is not None:
                self.searcher.changed(rows.cpu())

    def __reduce__(self) -> tuple:
        """What a spawned process gets: a reader of the same memory."""
        self._here("pickle", write=False)
        r = self._rings
        with self._lock:
            r.share()
            self._bind()
        names = ("norms", "mirror", "rounding", "head", "count")
        tensors = {"keys": self.keys.detach(), "values": self.values.detach(), **{n: getattr(r, n) for n in names}}
        return _as_reader, (type(self), self.config(), tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        copy = type(self).from_config(self.config(), device=self.device)
        copy.load_state_dict(self.state_dict())
        return copy

    @staticmethod
    def _split(state: dict[str, Tensor], counts: list[int]) -> Iterable[tuple[int, Tensor, Tensor]]:
        return list(zip(counts, state["hashes"].split(counts), state["order"].split(counts), strict=True))


def _as_reader(cls: type["State"], config: dict[str, Any], tensors: dict[str, Tensor | None]) -> "State":
    store = cls.from_config({**config, "capacity": 1, "optimizer": None, "grad_keys": False}, device=tensors["keys"].device)
    store.capacity, store._table, store._direct, store._write_plain = config["capacity"], None, False, None
    for name, t in tensors.items():
        setattr(store._rings, name, t)
    store._rings.views()
    store.keys, store.values = store._rings.keys, store._rings.values
    return store
