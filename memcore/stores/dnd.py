"""The differentiable neural dictionary (Pritzel et al. 2017): a store that is searched exactly, written in place, and trained."""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..functional import KnnLookup, knn_lookup
from . import _files, _table
from ._changes import WRITTEN, Changes
from ._lookup import Lookup
from ._optimizers import RowOptimizer, as_optimizer
from ._rings import RINGS, Rings, drop_rows, used_rows
from ._state import State
from .searchers import Searcher

__all__ = ["DND", "Stats"]

_DTYPES = (torch.float32, torch.float64)
_PATIENCE = 100  # lookups tried again because of a writer
_LARGEST = 2**31 - 2
_forks = 0
_increment_version = torch._C._increment_version


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Stats(NamedTuple):
    """Counts since the store was made, but for the first two."""

    entries: tuple[int, ...]
    """Of each dictionary, now."""
    bytes: int
    """Of all tensors, now."""
    appended: int
    updated: int
    replaced: int
    """Writes that took the slot of the entry used least recently."""
    deleted: int
    rejected: int
    """Writes of a key or value with NaN or Inf, which are not stored."""
    rows_trained: int
    rows_refused: int
    """Optimizer steps of a row that would have made it NaN or Inf."""


class DND(Lookup, Changes, State):
    """Dictionaries from keys to values whose read is the weighted mean of the nearest entries' values.

    read(h) = sum_i w_i v_i over the `neighbours` nearest keys h_i of h, w_i = k(h, h_i) / sum_j k(h, h_j), as `knn_lookup` has it. The A
    dictionaries lie in preallocated rings and are searched in one call. New entries are found at once; there is no index to rebuild.

    An entry is what has one 64-bit hash. A written entry that is there already becomes v + alpha (v_new - v) and takes the new key; one that
    is not there takes a free slot or, in a full dictionary, that of the entry used least recently: written, or returned as a neighbour (of
    one lookup the nearest counts as used last).

    A store is no module and its tensors are no buffers: see docs/dnd.md. One thread writes at a time; any number may look up. Other
    processes get a DND that can only look up when they are started by spawn with this one as an argument; those it returns as neighbours do not
    count as used unless their indices are passed to `touch` here.

    Args:
        dictionaries: A, one for each action in NEC.
        capacity: N, entries each can hold, >= 1.
        key_width: D.
        value_width: V, 1 in NEC.
        neighbours: K of `lookup`, >= 0 (NEC: 50).
        kernel, delta, metric: of `knn_lookup`.
        alpha: 0..1, how far an entry met again moves to its new value.
        optimizer: "adam", "rmsprop" or "sgd", or a `memcore.stores.Adam(...)` and so on; None without training.
        grad_keys: whether keys get gradients.
        bf16: keep a bfloat16 copy of float32 keys beside them, by which the CPU finds candidates: the same neighbours for half the bytes read.
        dtype: float32 or float64.
        device: of the tensors. Hashes and the order of use are kept on the host: with a GPU, pass `hashes` that lie there.
        searcher: finds candidates, as `memcore.stores.IVF()`; None compares with every key.

    Attributes:
        keys [A, N, D], values [A, N, V]: leaves; after a backward their `.grad` holds the rows used, until `step`. Only rows before `counts` hold
        entries. Change them through `write` and `step` alone.

    Raises:
        ValueError: a size or setting out of range. TypeError: of another type.

    Example:
        >>> import torch, memcore
        >>> store = memcore.DND(2, 1000, 3, neighbours=2)
        >>> store.write(torch.eye(3), torch.tensor([1.0, 2.0, 3.0]), dictionary=1)
        >>> store.lookup(torch.eye(3)[:1]).output.shape  # [A, Q, V]
        torch.Size([2, 1, 1])
    """

    def __init__(
        self,
        dictionaries: int,
        capacity: int,
        key_width: int,
        value_width: int = 1,
        *,
        neighbours: int = 50,
        kernel: str = "inverse_distance",
        delta: float = 1e-3,
        metric: str = "l2",
        alpha: float = 0.1,
        optimizer: str | RowOptimizer | None = "adam",
        grad_keys: bool = True,
        bf16: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        searcher: Searcher | None = None,
    ) -> None:
        sizes = {"dictionaries": dictionaries, "capacity": capacity, "key_width": key_width, "value_width": value_width}
        for name, size in sizes.items():
            _checks.whole("DND", name, size, 1)
            if size > _LARGEST:
                raise ValueError(f"memcore.DND: {name!r} must be at most {_LARGEST}, got {size}")
        _checks.whole("DND", "neighbours", neighbours, 0)
        _checks.finite_number("DND", "alpha", alpha)
        if not 0 <= alpha <= 1:
            raise ValueError(f"memcore.DND: 'alpha' must be between 0 and 1, got {alpha}")
        if dtype not in _DTYPES:
            raise TypeError(f"memcore.DND: 'dtype' must be torch.float32 or torch.float64, got {dtype}")
        if bf16 and dtype != torch.float32:
            raise TypeError(f"memcore.DND: 'dtype' must be torch.float32 with bf16, got {dtype}")
        self.dictionaries, self.capacity, self.key_width, self.value_width = dictionaries, capacity, key_width, value_width
        self.neighbours, self.kernel, self.delta, self.metric, self.alpha = neighbours, kernel, delta, metric, alpha
        self.optimizer = None if optimizer is None else as_optimizer("DND", optimizer)
        self.grad_keys, self.bf16, self.dtype, self.device = bool(grad_keys), bool(bf16), dtype, torch.device(device)
        self._rings = Rings(
            dictionaries, capacity, key_width, value_width, self.optimizer, grad_keys=self.grad_keys, bf16=bf16, dtype=dtype, device=self.device
        )
        none = torch.zeros(0, 1)
        knn_lookup(none, none, none, 0, kernel=kernel, delta=delta, metric=metric)  # judges these three
        self._table = _table.new_table(dictionaries, capacity)
        self._direct = self.device.type == "cpu" and hasattr(self._table, "write")
        self._counts = dict.fromkeys((*WRITTEN, "deleted", "rows_trained"), 0)
        self._refused = torch.zeros((), dtype=torch.int64, device=self.device)
        self._clock = 0
        self._log: Any = None
        self._start()
        self.searcher = searcher
        if searcher is not None:
            searcher.attach(self)
        self._choose()

    def _start(self) -> None:
        self._lock, self._fork = threading.RLock(), _forks
        self.keys, self.values = self._both = self._rings.keys, self._rings.values
        self._bind()

    def _bind(self) -> None:
        """Tell the table where the rows are."""
        if not self._direct:
            return
        r = self._rings
        addresses = (0 if t is None else t.data_ptr() for t in (r.keys, r.values, r.head, r.norms, r.mirror, r.rounding, r.steps))
        self._table.bind(self.key_width, self.value_width, self.dtype.itemsize, *addresses)

    def _choose(self) -> None:
        """How plain tensors are written at once, if nobody else need be told of them; None if they are not."""
        self._write_plain = self._table.writer() if self._direct and self._log is None and self.searcher is None else None

    def _here(self, op: str, write: bool = True) -> None:
        if self._fork != _forks:
            raise RuntimeError(
                f"memcore.DND.{op}: this store was made before the process forked, and a fork shares its locks and files; "
                "start the process with spawn: torch.multiprocessing.get_context('spawn')"
            )
        if write and self._table is None:
            raise RuntimeError(f"memcore.DND.{op}: this is a reader of a store that another process writes")

    # Reading ----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Entries in all dictionaries."""
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """Entries of each dictionary."""
        return self._rings.head[1:].tolist()

    def lookup(self, query: Tensor, k: int | None = None, *, dictionary: int | Tensor | None = None, touch: bool = True) -> KnnLookup:
        """Read at every query.

        Args:
            query: [Q, D], or [A, Q, D] with queries of its own for each dictionary.
            k: neighbours, instead of the store's.
            dictionary: ask this one, or one for each query ([Q] int64), instead of all; query is [Q, D] then.
            touch: whether the neighbours count as used.

        Returns:
            KnnLookup(output [A, Q, V], weights [A, Q, K], indices [A, Q, K], distances [A, Q, K]), without A if `dictionary` is given. Indices are
            slots; without enough entries they are -1 at weight 0, and output is 0 without any. Differentiable in query, keys and values.

        Raises:
            ValueError: wrong shape, k or dictionary. TypeError: not floating. RuntimeError: another device; a forked process. A backward after a
            write, delete or step raises RuntimeError, too.
        """
        if self._fork != _forks:
            self._here("lookup", write=False)
        if not isinstance(query, Tensor) or query.shape[-1:] != (self.key_width,) or query.dim() not in (2, 3):
            _checks.common("DND.lookup", ("query", query))
            raise ValueError(
                f"memcore.DND.lookup: 'query' must have shape (Q, D) or (A, Q, D) with (A, D) = ({self.dictionaries}, {self.key_width}), "
                f"got {tuple(query.shape)}"
            )
        if query.dim() == 3 and (query.shape[0] != self.dictionaries or dictionary is not None):
            form = "(Q, D) with 'dictionary'" if dictionary is not None else f"(A, Q, D) with A = {self.dictionaries}"
            raise ValueError(f"memcore.DND.lookup: 'query' must have shape {form}, got {tuple(query.shape)}")
        if query.dtype != self.dtype and query.is_floating_point():
            query = query.to(self.dtype)
        if k is None:
            k = self.neighbours
        else:
            _checks.whole("DND.lookup", "k", k, 0)
        which = None if dictionary is None else self._which("lookup", dictionary, query.shape[0])
        rings = self._rings
        for attempt in range(_PATIENCE):
            epoch = rings.epoch
            if epoch % 2 == 0:
                found = self._find(query, k, which)
                if rings.epoch == epoch:
                    break
            time.sleep(0 if attempt < 10 else 1e-3)
        else:
            if self._table is None:
                raise RuntimeError(f"memcore.DND.lookup: the writer changed the store during each of {_PATIENCE} lookups")
            with self._lock:
                epoch, found = rings.epoch, self._find(query, k, which)
        if found.output.requires_grad:
            self._watch(found, epoch)
        if touch and self._table is not None:
            self._touch(found.indices.detach(), which)
        return found

    def _watch(self, found: KnnLookup, epoch: int) -> None:
        def check(_: Tensor) -> None:
            if self._rings.epoch != epoch:
                raise RuntimeError(
                    "memcore.DND.lookup: the store was changed between this lookup and its backward, whose rows may be those of other entries now; "
                    "write and step after the backward"
                )

        for t in (found.output, found.weights, found.distances):
            if t.requires_grad:
                t.register_hook(check)

    # Order of use -----------------------------------------------------------------------------------------------------

    def touch(self, indices: Tensor, *, dictionary: int | Tensor | None = None) -> None:
        """Count entries as used, as a lookup does with its neighbours.

        Args:
            indices: int64, as `lookup` returned them; -1 is skipped.
            dictionary: as it was given there.
        """
        self._here("touch")
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
            raise TypeError(f"memcore.DND.touch: 'indices' must be an int64 tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
        which = None if dictionary is None else self._which("touch", dictionary, indices.shape[0])
        _checks.dims("DND.touch", "indices", indices, "A, Q, K" if which is None else "Q, K")
        if which is None and indices.shape[0] != self.dictionaries:
            raise ValueError(f"memcore.DND.touch: 'indices' must have shape (A, Q, K) with A = {self.dictionaries}, got {tuple(indices.shape)}")
        self._touch(indices.detach(), which)

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(
        self, keys: Tensor, values: Tensor, hashes: Tensor | Sequence[int] | int | None = None, *, dictionary: int | Tensor | None = None
    ) -> None:
        """Add entries, or update those that are there, as if written one after another.

        Args:
            keys: [n, D], or [D].
            values: [n, V], or [n] if V = 1; of one key also [V] or a number.
            hashes: [n] int64, who they are (NEC: `hash_rows(observations)`); by default hashes of the keys' bytes.
            dictionary: an int, or [n] int64, one for each; may be left out if there is one dictionary.

        Raises:
            ValueError: wrong shape or dictionary. TypeError: wrong type. RuntimeError: a forked process, or a reader. Then nothing is written. Keys
            and values with NaN or Inf are counted as rejected and not stored.
        """
        if self._fork != _forks or self._table is None:
            self._here("write")
        plain = self._write_plain
        if plain is not None:  # few steps: after a search they, too, come from slow memory
            with self._lock:
                if self.keys.grad is None and self.values.grad is None and plain(keys, values, hashes, dictionary, self.alpha):
                    _increment_version(self._both)  # a backward that saved them raises
                    return
        keys, values = self._entries(keys, values)
        n = len(keys)
        if hashes is not None:
            hashes = _table.as_hashes("DND.write", hashes, n)
        if dictionary is None:
            if self.dictionaries > 1:
                raise ValueError(f"memcore.DND.write: 'dictionary' must be given, as there are {self.dictionaries}")
            a, which = 0, None
        elif type(dictionary) is int and 0 <= dictionary < self.dictionaries:
            a, which = dictionary, None
        else:
            a, which = 0, self._which("write", dictionary, n)
        with self._lock:
            pending = self.keys.grad is not None or self.values.grad is not None
            told = pending or self._log is not None or self.searcher is not None
            if self._direct:
                placed = torch.empty(n, 2, dtype=torch.int64) if told else None
                self._table.write(
                    keys.data_ptr(), values.data_ptr(), 0 if hashes is None else hashes.data_ptr(), 0 if which is None else which.data_ptr(),
                    a, n, self.alpha, 0 if placed is None else placed.data_ptr(),
                )  # fmt: skip
                _increment_version(self._both)
            else:
                placed = self._write_rows(keys, values, hashes, torch.full((n,), a) if which is None else which)
            if told and n:
                self._tell(keys, hashes, torch.full((n,), a) if which is None else which, placed, pending)

    def delete(self, hashes: Tensor | Sequence[int] | int, *, dictionary: int | None = None) -> int:
        """Remove entries; the last slot's entry moves into each slot freed. Returns how many were there.

        Args:
            hashes: their identities, as of `write`.
            dictionary: one of them; may be left out if there is one.
        """
        self._here("delete")
        if dictionary is None and self.dictionaries > 1:
            raise ValueError(f"memcore.DND.delete: 'dictionary' must be given, as there are {self.dictionaries}")
        a = int(self._which("delete", 0 if dictionary is None else dictionary, 1)[0])
        found = 0
        with self._lock:
            for hash in _table.as_hashes("DND.delete", hashes).tolist():
                found += self._delete(a, hash)
            self._counts["deleted"] += found
        return found

    def clear(self, dictionary: int | None = None) -> None:
        """Remove every entry, or every one of a dictionary."""
        self._here("clear")
        which = range(self.dictionaries) if dictionary is None else self._which("clear", dictionary, 1).tolist()
        with self._lock:
            for a in which:
                rows = a * self.capacity + torch.arange(self._table.size(a))
                drop_rows(self.keys, rows)
                drop_rows(self.values, rows)
                with self._rings.changing():
                    self._table.clear(a)
                    self._rings.set_count(a, 0)
                if self.searcher is not None:
                    self.searcher.changed(rows)
                if self._log is not None:
                    self._log.clear(a)

    def find(self, hashes: Tensor | Sequence[int] | int, *, dictionary: int = 0) -> Tensor:
        """[n] slots of entries, -1 for those that are not there; does not count as use."""
        self._here("find")
        a = int(self._which("find", dictionary, 1)[0])
        return torch.tensor([self._table.find(a, h) for h in _table.as_hashes("DND.find", hashes).tolist()], dtype=torch.int64)

    # Training ---------------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.keys.grad = self.values.grad = None

    @torch.no_grad()
    def step(self, lr: float, *, keys: bool = True) -> None:
        """One optimizer step of the rows that have a gradient, which is used up. Rows that it would make NaN or Inf stay as they are.

        Args:
            lr: learning rate, >= 0.
            keys: whether keys are trained, too.

        Raises:
            ValueError: bad lr. RuntimeError: the store has no optimizer.
        """
        self._here("step")
        _checks.finite_number("DND.step", "lr", lr)
        if lr < 0:
            raise ValueError(f"memcore.DND.step: 'lr' must be at least 0, got {lr}")
        if self.optimizer is None:
            raise RuntimeError("memcore.DND.step: the store was made with optimizer=None")
        r = self._rings
        changed = []
        with self._lock, r.changing():
            for column, (name, ring, flat) in enumerate(zip(RINGS, (self.keys, self.values), (r.flat_keys, r.flat_values), strict=True)):
                if ring.grad is None or (name == "keys" and not keys):
                    continue
                rows, grad = used_rows(ring.grad)
                old, before = flat[rows], r.state_of(name, rows)
                step = (rows.new_zeros(len(rows)) if r.steps is None else r.steps[rows, column].long()) + 1
                new, after = self.optimizer.update(old, grad.to(old.dtype), before, step[:, None].double(), lr)
                good = new.isfinite().all(1, keepdim=True)
                for t in after.values():
                    good &= t.isfinite().all(1, keepdim=True)
                self._refused += (~good).sum()
                for s, t in after.items():
                    r.state[name][s][rows] = torch.where(good, t, before[s])
                if r.steps is not None:
                    r.steps[rows, column] = (step - 1 + good.squeeze(1).long()).int()
                new = torch.where(good, new, old)
                if name == "keys":
                    r.set_keys(rows, new)
                else:
                    flat[rows] = new
                self._counts["rows_trained"] += len(rows)
                changed.append(rows.cpu())
            self.zero_grad()
            if changed and self.searcher is not None:
                self.searcher.changed(torch.cat(changed).unique())
            if changed and self._log is not None:
                self._log.rows(torch.cat(changed).unique())

    def stats(self) -> Stats:
        """How much the store holds and what happened to it."""
        r = self._rings
        tensors = (self.keys, self.values, r.norms, r.mirror, r.rounding, r.stamps, r.steps, *r.state_tensors().values())
        counts = dict(self._counts)
        if self._direct:
            counts |= zip(WRITTEN, self._table.written(), strict=True)
        return Stats(tuple(self.counts), sum(t.nbytes for t in tensors if t is not None), **counts, rows_refused=int(self._refused))

    def __repr__(self) -> str:
        sizes = f"{self.dictionaries}, {self.capacity}, {self.key_width}, {self.value_width}"
        return f"DND({sizes}, neighbours={self.neighbours}, alpha={self.alpha}, optimizer={self.optimizer}) with {len(self)} entries"

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write all of it to one safetensors file, checksummed and atomic: a crash or a full disk leaves the old file.

        Args:
            path: by default the snapshot of the folder it was opened from, whose log starts anew then.

        Raises:
            OSError: it cannot be written. ValueError: no path, and no folder. ImportError: safetensors is not installed.
        """
        self._here("save")
        with self._lock:
            if path is not None:
                _files.save(self, Path(path), {})
                return
            if self._log is None:
                raise ValueError("memcore.DND.save: 'path' must be given for a store that was not opened from a folder")
            _files.save(self, self._log.path.with_name(_files.SNAPSHOT), {"id": self._log.identity, "sequence": self._log.sequence})
            self._log.restart()

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", searcher: Searcher | None = None) -> "DND":
        """The store that `save` wrote, order of use and optimizer's state included.

        Raises:
            StoreError (a ValueError): there is no such file, it is damaged or truncated, or no store.
        """
        return _files.load(cls, Path(path), device=device, searcher=searcher)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], dictionaries: int | None = None, capacity: int | None = None, key_width: int | None = None,
        value_width: int = 1, *, device: torch.device | str = "cpu", searcher: Searcher | None = None, **settings: Any,
    ) -> "DND":  # fmt: skip
        """The store in a folder, which survives crashes: what was there at the last `flush` (or `save`) is there again.

        Every write, delete, clear and step is appended to a log in memory; `flush` commits them together. The log holds entries, not which
        of them were looked up and not the optimizer's state: after a crash entries changed since the last `save` count as used when they were
        written, and their optimizer's state is what it was at that `save`, zero for those that are newer. One process may have it open.

        Args:
            folder: created if it is not there; the folder it lies in must be.
            the others: of `DND(...)`; needed for a new store, and those of an old one if they are given.

        Raises:
            StoreError (a ValueError): files that are damaged (other than a torn tail of the log, which is cut), of another kind or of another
            store. RuntimeError: it is open elsewhere. OSError: it cannot be read or written.
        """
        new = None
        more = {"device": device, "searcher": searcher}
        if dictionaries is not None:
            new = cls(dictionaries, capacity, key_width, value_width, **settings, **more)
        store, store._log = _files.open_folder(cls, Path(folder), new, **more)
        store._choose()
        return store

    def flush(self) -> None:
        """Commit to the log what happened since the last time: from now on a crash loses nothing of it.

        Raises:
            OSError: the log cannot be written; nothing is lost yet, and the next flush tries again. ValueError: there is no log.
        """
        self._here("flush")
        if self._log is None:
            raise ValueError("memcore.DND.flush: the store must have been opened from a folder (memcore.DND.open)")
        with self._lock:
            self._log.flush()

    def close(self) -> None:
        """Flush and let go of the folder; without one, nothing."""
        if self._log is not None:
            self.flush()
            self._log.close()
            self._log = None
            self._choose()

    def __enter__(self) -> "DND":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
