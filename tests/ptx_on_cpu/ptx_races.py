"""Unordered accesses to one word of memory."""

from __future__ import annotations

import numpy as np

from ptx_program import PtxError
from ptx_runtime import every, some

__all__ = ["BLOCK_AT", "EPOCH_AT", "MANY", "MANY_BLOCKS", "RELEASES_AT", "SYNC_AT", "Races", "views"]

_MANY_WARP, _MANY = np.int64(1 << 10), np.int64(1 << 11)
MANY_BLOCKS = np.int64(1 << 12)
MANY = _MANY_WARP | _MANY
SYNC_AT, RELEASES_AT, EPOCH_AT, BLOCK_AT = 13, 27, 30, 46
_SYNC = np.int64((1 << RELEASES_AT) - (1 << SYNC_AT))


def views(data: np.ndarray) -> dict[int, np.ndarray]:
    """Unsigned views by size; 16 bytes as pairs."""
    whole = data[: len(data) // 16 * 16]
    return {1: whole, 2: whole.view(np.uint16), 4: whole.view(np.uint32), 8: whole.view(np.uint64), 16: whole.view([("a", np.uint64), ("b", np.uint64)])}


def _alike(a, b, replicas: bool):
    """Equal bits; or float32 as good as equal beside the largest of them, where `replicas` are allowed."""
    same = a == b
    if replicas and a.dtype.itemsize == 4 and not every(same):
        x, y = a.view(np.float32), b.view(np.float32)
        largest = np.abs(x[np.isfinite(x)]).max(initial=0.0)
        same = same | np.isclose(x, y, rtol=1e-5, atol=2e-6 * largest, equal_nan=True)
    return same


class Races:
    """Who last wrote and read each granule, and since when: two accesses of which one writes need a barrier between them.

    An access is (block, block barriers passed, releases and warp barriers since, thread) in one int64. Here releases order nothing.
    """

    def __init__(self, nbytes: int, granule: int, what: str):
        self.g = granule
        self.what = what
        self.writes = np.zeros(-(-nbytes // granule) + 1, np.int64)
        self.reads = np.zeros(-(-nbytes // granule) + 1, np.int64)

    def conflict(self, before, me):
        x = before ^ me
        other_block = (x >> BLOCK_AT) != 0
        same_epoch = (x >> EPOCH_AT) == 0
        other_warp = (x & 0x3E0) != 0
        other_lane = (x & 0x1F) != 0
        same_sync = (x & _SYNC) == 0
        many, many_warp = (before & _MANY) != 0, (before & _MANY_WARP) != 0
        unordered = same_epoch & (many | other_warp | (same_sync & (other_lane | many_warp)))
        return (before != 0) & (other_block | unordered | ((before & MANY_BLOCKS) != 0))

    def check(self, group, byte, size, lanes, write, memory, values):
        g = self.g
        me = group.me if lanes is None else group.me[lanes]
        at = byte // g
        if size > g:
            k = size // g
            at = (at[:, None] + np.arange(k)).reshape(-1)
            me = np.repeat(me, k)
        before = self.writes[at]
        bad = self.conflict(before, me)
        if write:
            if values is not None and some(bad):
                bad &= ~self.unchanged(byte, size, lanes, memory, values, len(bad), group)
            readers = self.readers(at, me)
            if some(readers):
                self.report(group, at, readers, lanes, size, "a write after another thread's read")
            self.writes[at] = me
            twice = self.writes[at] != me  # several lanes of this very instruction
            if some(twice) and values is not None:
                self.same_values(group, byte, size, lanes, values, at)
        else:
            self.read(at, me)
        if some(bad):
            self.report(group, at, bad, lanes, size, "a write after another thread's write" if write else "a read after another thread's write")

    def readers(self, at, me):
        """Those whose write meets a read before it."""
        return self.conflict(self.reads[at], me)

    def read(self, at, me) -> None:
        self.note(self.reads, at, me)

    @staticmethod
    def note(reads, at, me) -> None:
        seen = reads[at]
        x = seen ^ me
        many = np.zeros(len(at), np.int64)
        live = (seen != 0) & ((x >> EPOCH_AT) == 0)
        same_sync = live & ((x & _SYNC) == 0)  # a lane's read before the warp's barrier bothers its warp no more
        many[same_sync & (x & 0x1F != 0)] |= _MANY_WARP
        many[live & (x & 0x3E0 != 0)] |= _MANY
        many |= np.where(live, seen & _MANY, 0) | np.where(same_sync, seen & _MANY_WARP, 0)
        many[(seen != 0) & ((x >> BLOCK_AT) != 0)] |= MANY_BLOCKS
        many |= seen & MANY_BLOCKS
        reads[at] = me | many
        now = reads[at]
        y = now ^ me
        if some((y & 0x3FF != 0) | (y >> BLOCK_AT != 0)):  # other lanes of this instruction read it too
            w, x_, z = (y & 0x1F) != 0, (y & 0x3E0) != 0, (y >> BLOCK_AT) != 0
            for flag, where in ((_MANY_WARP, w), (_MANY, x_), (MANY_BLOCKS, z)):
                if some(where):
                    reads[at[where]] |= flag

    def unchanged(self, byte, size, lanes, memory, values, total, group):
        """Writing again what is there harms nobody."""
        n = size // len(values)
        same = np.ones(len(byte), bool)
        for k, v in enumerate(values):
            same &= _alike(memory[n][byte // n + k], (v if lanes is None else v[lanes]).view(f"u{n}"), group.m.replicas)
        return np.repeat(same, total // len(byte))

    def same_values(self, group, byte, size, lanes, values, at):
        order = np.argsort(byte, kind="stable")
        twins = np.nonzero(byte[order][1:] == byte[order][:-1])[0]
        n = size // len(values)
        for v in values:
            w = (v if lanes is None else v[lanes]).view(f"u{n}")[order]
            differ = ~_alike(w[twins], w[twins + 1], group.m.replicas)
            if some(differ):
                bad = np.zeros(len(at), bool)
                bad[int(order[twins[differ][0]]) * max(1, size // self.g)] = True
                self.report(group, at, bad, lanes, size, "two lanes of one store write different values")

    def report(self, group, at, bad, lanes, size, what):
        i = int(np.nonzero(bad)[0][0])
        row = i // max(1, size // self.g)
        lane = row if lanes is None else int(lanes[row])
        message = f"race in {self.what} memory: {what}, no barrier between them; thread {int(group.lin[lane])}, byte {int(at[i]) * self.g}"
        if group.m.races == "collect":
            group.m.report.races.append(message)
        else:
            raise PtxError(message)
