"""Where a dictionary's entries are: the slot table of `memcore._store` (C++), or one of the same interface in Python."""

from collections import OrderedDict
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from .. import _backend, _checks

__all__ = ["APPENDED", "REJECTED", "REPLACED", "UPDATED", "SlotTable", "as_hashes", "compiled", "hash_rows", "new_table"]

UPDATED, APPENDED, REPLACED, REJECTED = range(4)

try:
    compiled = import_module("memcore._store")
    missing = ""
    if hasattr(Tensor, "__dlpack_c_exchange_api__"):
        compiled.use_tensors(Tensor, Tensor.__dlpack_c_exchange_api__)
except ImportError as e:
    compiled = None
    missing = (
        f"memcore's slot table is not built or does not load ({e}); build it with: "
        "pip install pybind11 && pip install --no-build-isolation . (in a checkout: python setup.py build_ext --inplace)"
    )


class SlotTable:
    """A dictionaries of N slots: hash -> slot, and the slots in the order of their last use. Slots 0..size-1 are taken."""

    def __init__(self, A: int, N: int) -> None:
        self.A, self.N = A, N
        self._slot: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(A)]  # hash -> slot, the least recently used first
        self._hash: list[list[int]] = [[] for _ in range(A)]

    def find(self, a: int, hash: int) -> int:
        return self._slot[a].get(hash, -1)

    def size(self, a: int) -> int:
        return len(self._hash[a])

    def clear(self, a: int) -> None:
        self._slot[a].clear()
        self._hash[a].clear()

    def put(self, dictionaries: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots and kinds (updated, appended, replaced) of entries put one after another, each the latest used then."""
        done = [self._put(a, h) for a, h in zip(dictionaries.tolist(), hashes.tolist(), strict=True)]
        slots, kinds = zip(*done, strict=True) if done else ((), ())
        return np.array(slots, np.int64), np.array(kinds, np.uint8)

    def _put(self, a: int, hash: int) -> tuple[int, int]:
        slot_of, hash_of = self._slot[a], self._hash[a]
        if hash in slot_of:
            slot_of.move_to_end(hash)
            return slot_of[hash], UPDATED
        if len(hash_of) < self.N:
            slot, kind = len(hash_of), APPENDED
            hash_of.append(hash)
        else:
            slot, kind = slot_of.popitem(last=False)[1], REPLACED
            hash_of[slot] = hash
        slot_of[hash] = slot
        return slot, kind

    def remove(self, a: int, hash: int) -> tuple[int, int]:
        """(slot, moved): the slot freed, -1 if the hash is not there; the last slot, whose entry must be moved into it."""
        slot_of, hash_of = self._slot[a], self._hash[a]
        slot = slot_of.pop(hash, -1)
        if slot < 0:
            return -1, -1
        last = hash_of.pop()
        if last != hash:
            hash_of[slot] = last
            slot_of[last] = slot
        return slot, len(hash_of)

    def order(self, a: int) -> np.ndarray:
        """Slots from the least to the most recently used."""
        return np.fromiter(self._slot[a].values(), np.int64, len(self._slot[a]))

    def hashes(self, a: int) -> np.ndarray:
        """Hashes by slot."""
        return np.array(self._hash[a], np.int64)

    def oldest(self, a: int, slots: np.ndarray) -> None:
        """These slots, in this order, become the least recently used."""
        for slot in reversed(slots.tolist()):
            self._slot[a].move_to_end(self._hash[a][slot], last=False)

    def touch(self, a: int, slots: np.ndarray) -> None:
        """These slots, one after another, become the latest used; those that hold nothing are skipped."""
        hash_of, touch = self._hash[a], self._slot[a].move_to_end
        for slot in slots.tolist():
            if 0 <= slot < len(hash_of):
                touch(hash_of[slot])


def new_table(A: int, N: int):
    """The compiled table, or the Python one, which is told once."""
    if compiled is not None:
        return compiled.SlotTable(A, N)
    _backend._tell_once(f"memcore.DND keeps its slot table in Python: {missing}")
    return SlotTable(A, N)


def hash_rows(rows: Tensor) -> Tensor:
    """A 64-bit hash of every row's bytes: an identity for `DND.write`, of an observation for example.

    Args:
        rows: [n, ...] of any dtype. Rows that compare equal but differ in bytes (0.0 and -0.0) differ here.

    Returns:
        [n] int64 on the CPU; the same on every machine of the same byte order.

    Raises:
        TypeError: not a tensor. ValueError: no dimensions.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"memcore.hash_rows: 'rows' must be a tensor, got {type(rows).__name__}")
    if rows.dim() == 0:
        raise ValueError("memcore.hash_rows: 'rows' must have shape (n, ...), got ()")
    rows = rows.detach().cpu().contiguous()
    n = rows.shape[0]
    size = rows[0].numel() * rows.element_size() if n else 0
    if compiled is not None:
        return torch.from_numpy(compiled.hash_rows(rows.data_ptr(), n, size))
    data = np.zeros((n, -(-size // 8) * 8), np.uint8)
    if n and size:
        data[:, :size] = rows.reshape(n, -1).view(torch.uint8).numpy()
    h = np.full(n, 0x243F6A8885A308D3 ^ size, np.uint64)
    for word in data.view(np.uint64).T:
        h = (h ^ word) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(32)
    h = (h ^ (h >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
    return torch.from_numpy((h ^ (h >> np.uint64(32))).view(np.int64))


def as_hashes(op: str, hashes, n: int | None = None) -> Tensor:
    """[n] int64 on the CPU of a tensor, an int or a sequence of ints below 2^64."""
    if isinstance(hashes, int) and not isinstance(hashes, bool):
        hashes = [hashes]
    if isinstance(hashes, Tensor):
        if hashes.dtype not in (torch.int64, torch.uint64):
            raise TypeError(f"memcore.{op}: 'hashes' must be int64, got {hashes.dtype}")
        found = hashes.detach().cpu().view(torch.int64).contiguous()
    else:
        try:
            found = torch.tensor([(int(h) + (1 << 63)) % (1 << 64) - (1 << 63) for h in hashes], dtype=torch.int64)
        except (TypeError, ValueError):
            raise TypeError(f"memcore.{op}: 'hashes' must be an int64 tensor or whole numbers, got {type(hashes).__name__}") from None
    found = found.reshape(1) if found.dim() == 0 else found
    _checks.dims(op, "hashes", found, "n")
    if n is not None and found.shape != (n,):
        raise ValueError(f"memcore.{op}: 'hashes' must have shape (n) = ({n},) to match 'keys', got {tuple(found.shape)}")
    return found
