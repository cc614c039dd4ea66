"""A store on disk: one snapshot, or a folder of a snapshot and a log of what came after it."""

import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._sealed import read_sealed, sync_folder, write_sealed

if TYPE_CHECKING:
    from .dnd import DND

__all__ = ["Log", "StoreError", "load", "open_folder", "save"]

_FORMAT = "memcore-store-1"
_MAGIC = b"memcore-log-1\n"
SNAPSHOT, LOG = "snapshot.safetensors", "log"
_FRAME = struct.Struct("<4sIIBQQ")  # mark, length of the payload, checksum, kind, sequence number, bytes that were synced before it
_MARK = b"mcR\x01"
HEAD, PUT, ROWS, DELETE, CLEAR = range(5)
_COMMIT = 4 << 20  # bytes that wait at most


class StoreError(ValueError):
    """A file that is missing, damaged, of another kind, or of another store."""


# Snapshots ------------------------------------------------------------------------------------------------------------


def save(store: "DND", path: Path, log: dict[str, Any]) -> None:
    try:
        write_sealed(path, _FORMAT, store.state_dict(), {"config": store.config(), **log})
    except OSError as e:
        raise type(e)(e.errno, f"memcore.DND.save: {str(path)!r} cannot be written ({e.strerror}); what was there before is unchanged") from e


def _read(op: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def refuse(what: str) -> StoreError:
        return StoreError(f"memcore.DND.{op}: {str(path)!r} must be a memcore store, got {what}")

    return read_sealed(path, _FORMAT, refuse)


def load(cls: type["DND"], path: Path, **more: Any) -> "DND":
    state, record = _read("load", path)
    store = cls.from_config(record["config"], **more)
    store.load_state_dict(state)
    return store


# The log --------------------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    kind: int
    sequence: int
    synced: int
    payload: bytes
    end: int


def _frame(kind: int, sequence: int, synced: int, payload: bytes) -> bytes:
    rest = struct.pack("<BQQ", kind, sequence, synced)
    return _FRAME.pack(_MARK, len(payload), zlib.crc32(payload, zlib.crc32(rest)), kind, sequence, synced) + payload


def _record(data: bytes, at: int) -> _Record | None:
    """The whole record at an offset, or None."""
    if at + _FRAME.size > len(data):
        return None
    mark, length, crc, kind, sequence, synced = _FRAME.unpack_from(data, at)
    end = at + _FRAME.size + length
    if mark != _MARK or end > len(data):
        return None
    payload = data[at + _FRAME.size : end]
    if zlib.crc32(payload, zlib.crc32(struct.pack("<BQQ", kind, sequence, synced))) != crc:
        return None
    return _Record(kind, sequence, synced, payload, end)


def _records(path: Path, data: bytes) -> tuple[list[_Record], int]:
    """Whole records, and where they end.

    A record whose commit began behind the first damaged byte tells that this byte had been synced: that is damage, which nobody should cut off
    unasked. Without one, the rest is a tail that a crash tore.
    """
    found, at = [], len(_MAGIC)
    while (record := _record(data, at)) is not None:
        found.append(record)
        at = record.end
    later = at
    while (later := data.find(_MARK, later + 1)) >= 0:
        record = _record(data, later)
        if record is not None and record.synced > at:
            raise StoreError(
                f"memcore.DND.open: {str(path)!r} is damaged at byte {at}, and whole records follow at byte {later}; "
                f"to go on without what follows, cut the file there (truncate -s {at})"
            )
    return found, at


class Log:
    """Changes of a store, appended in memory and committed by `flush`. One process holds it."""

    def __init__(self, folder: Path) -> None:
        import fcntl  # not on Windows

        self.path = folder / LOG
        try:
            folder.mkdir(exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as e:
            raise type(e)(e.errno, f"memcore.DND.open: {str(folder)!r} cannot be used ({e.strerror})") from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RuntimeError(f"memcore.DND.open: {str(folder)!r} is open in another process or store; one alone may write it") from None
        self.store: DND | None = None
        self.identity, self.sequence, self._begin, self._end = "", 0, 0, 0
        self._waiting: list[bytes] = []
        self._bytes = 0

    def read(self) -> list[_Record]:
        """Records of the file, whose torn tail is cut."""
        data = self.path.read_bytes()
        if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
            raise StoreError(f"memcore.DND.open: {str(self.path)!r} must be a memcore log, got a file of another kind")
        records, end = _records(self.path, data) if len(data) >= len(_MAGIC) else ([], 0)
        if records and (records[0].kind != HEAD or any(b.sequence != a.sequence + 1 for a, b in zip(records[1:], records[2:], strict=False))):
            raise StoreError(f"memcore.DND.open: {str(self.path)!r} must hold records in their order, got others")
        if not records:
            end = 0
        if end < len(data):
            os.ftruncate(self._file.fileno(), end)
            os.fsync(self._file.fileno())
        self._begin, self._end = (records[0].end if records else 0), end
        return records

    def begin(self, identity: str, config: dict[str, Any]) -> None:
        """The first bytes of a new log."""
        self._waiting = [_MAGIC + _frame(HEAD, 0, 0, json.dumps({"id": identity, "config": config}).encode())]
        self._commit()
        self._begin = self._end
        sync_folder(self.path.parent)
        sync_folder(self.path.parent.parent)

    def _append(self, kind: int, payload: bytes) -> None:
        self.sequence += 1
        self._waiting.append(_frame(kind, self.sequence, self._end, payload))
        self._bytes += len(self._waiting[-1])
        if self._bytes >= _COMMIT:
            self._commit()

    def _content(self, rows: Tensor) -> bytes:
        rings = self.store._rings
        at = rows.to(rings.flat_keys.device)
        return b"".join(t[at].cpu().numpy().tobytes() for t in (rings.flat_keys, rings.flat_values))

    def put(self, rows: Tensor, hashes: Tensor) -> None:
        self._append(PUT, struct.pack("<I", len(rows)) + rows.numpy().tobytes() + hashes.numpy().tobytes() + self._content(rows))

    def rows(self, rows: Tensor) -> None:
        self._append(ROWS, struct.pack("<I", len(rows)) + rows.numpy().tobytes() + self._content(rows))

    def delete(self, a: int, hash: int) -> None:
        self._append(DELETE, struct.pack("<Iq", a, hash))

    def clear(self, a: int) -> None:
        self._append(CLEAR, struct.pack("<I", a))

    def _commit(self) -> None:
        """Write and sync what waits. After an error it still waits, and the file ends where it did."""
        data = b"".join(self._waiting)
        if not data:
            return
        descriptor = self._file.fileno()
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError as e:
            os.ftruncate(descriptor, self._end)
            raise type(e)(
                e.errno,
                f"memcore.DND.flush: {str(self.path)!r} cannot be written ({e.strerror}); what came since the last flush is in memory alone, "
                "and the next flush tries again",
            ) from e
        self._end += len(data)
        self._waiting, self._bytes = [], 0

    flush = _commit

    def restart(self) -> None:
        """Forget the records: a snapshot holds what they did."""
        self._waiting, self._bytes = [], 0
        os.ftruncate(self._file.fileno(), self._begin)
        os.fsync(self._file.fileno())
        self._end = self._begin

    def close(self) -> None:
        self._file.close()


# Recovery -------------------------------------------------------------------------------------------------------------


def _arrays(store: "DND", payload: bytes, hashed: bool) -> Iterator[Tensor]:
    """Rows, hashes if there are any, keys and values of a record."""
    (n,) = struct.unpack_from("<I", payload)
    number = np.float32 if store.dtype == torch.float32 else np.float64
    at = 4
    for kind, width in ((np.int64, 1), *(((np.int64, 1),) if hashed else ()), (number, store.key_width), (number, store.value_width)):
        array = np.frombuffer(payload, kind, n * width, at).copy()
        at += array.nbytes
        yield torch.from_numpy(array if kind == np.int64 else array.reshape(n, width))


@torch.no_grad()
def _apply(store: "DND", record: _Record) -> None:
    rings, table, N = store._rings, store._table, store.capacity
    if record.kind == DELETE:
        store._delete(*struct.unpack("<Iq", record.payload))
    elif record.kind == CLEAR:
        store.clear(*struct.unpack("<I", record.payload))
    elif record.kind in (PUT, ROWS):
        rows, *hashes, keys, values = _arrays(store, record.payload, record.kind == PUT)
        if hashes:
            fresh = []
            for row, hash in zip(rows.tolist(), hashes[0].tolist(), strict=True):
                a, slot = divmod(row, N)
                if table.size(a) == N and table.find(a, hash) < 0:
                    table.oldest(a, np.array([slot]))  # whom it replaced then
                (to,), (kind,) = table.put(np.array([a]), np.array([hash]))
                if to != slot:
                    raise ValueError(f"an entry of slot {slot} that belongs in slot {to}")
                if kind:
                    fresh.append(row)
                rings.set_count(a, table.size(a))
            if rings.stamps is not None:
                rings.stamps.scatter_reduce_(0, rows.to(store.device), store._clock + torch.arange(1, len(rows) + 1, device=store.device), "amax")
                store._clock += len(rows)
            rings.clear_state(torch.tensor(fresh, dtype=torch.int64, device=store.device))
        rows, at = np.unique(rows.numpy(), return_index=True)
        rows = torch.from_numpy(rows).to(store.device)
        rings.set_keys(rows, keys[at].to(store.device))
        rings.flat_values[rows] = values[at].to(store.device)
    else:
        raise ValueError(f"a record of kind {record.kind}")


def open_folder(cls: type["DND"], folder: Path, new: "DND | None", **more: Any) -> "tuple[DND, Log]":
    """The store of a folder, with its log; a new one if there is none."""
    log = Log(folder)
    try:
        snapshot = folder / SNAPSHOT
        state, about = _read("open", snapshot) if snapshot.exists() else (None, None)
        records = log.read()
        if records:
            head = json.loads(records[0].payload)
            if about is not None and about.get("id") != head["id"]:
                raise StoreError(f"memcore.DND.open: {str(log.path)!r} must be the log of {SNAPSHOT}, got that of another store")
            config, log.identity = head["config"], head["id"]
        elif about is not None:
            config, log.identity = about["config"], about.get("id") or secrets.token_hex(16)
        elif new is not None:
            config, log.identity = new.config(), secrets.token_hex(16)
        else:
            raise StoreError(f"memcore.DND.open: {str(folder)!r} holds no store yet: 'dictionaries', 'capacity' and 'key_width' must be given")
        config = json.loads(json.dumps(config))
        wanted = config if new is None else json.loads(json.dumps(new.config()))
        if config != wanted:
            differs = next(name for name in config if config[name] != wanted.get(name))
            raise StoreError(f"memcore.DND.open: {differs!r} must be that of the store in {str(folder)!r}, {config[differs]!r}, got {wanted[differs]!r}")
        store = cls.from_config(config, **more) if new is None else new
        if state is not None:
            store.load_state_dict(state)
            log.sequence = about.get("sequence", 0)
        later = [r for r in records[1:] if r.sequence > log.sequence]
        if later and later[0].sequence != log.sequence + 1:
            raise StoreError(f"memcore.DND.open: {str(log.path)!r} goes on from change {later[0].sequence - 1}, and {SNAPSHOT} ends at {log.sequence}")
        for record in later:
            try:
                _apply(store, record)
            except (ValueError, IndexError, struct.error) as e:
                raise StoreError(f"memcore.DND.open: {str(log.path)!r} holds a change that does not fit its store ({e})") from e
            log.sequence = record.sequence
        if store.searcher is not None:
            store.searcher.changed(store._taken())
        if not records:
            log.begin(log.identity, config)
        elif not later:  # a crash may have come between the snapshot, which holds changes that never reached the log, and the log's new start
            log.restart()
    except BaseException:
        log.close()
        raise
    log.store = store
    return store, log
