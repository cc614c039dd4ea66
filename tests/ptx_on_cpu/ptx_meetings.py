"""Blocks that wait for each other through global memory: who sleeps, who learnt of whom, and which accesses that orders.

A thread that waits executes nanosleep in its loop: it steps aside until the next round, when all others have gone as far as they can.
In the orders of warps, and when races are looked for, arrivals (red.release and the like) go in halves: the first half of the
blocks, half of the rest a round later, at last one alone. So somebody looks while one arrival is missing, and a wait for too few is
seen.

For races each block has a vector: what it knows of every block beside it. A release leaves the vector at its word (what came after
the block's last barrier counts for the releasing thread alone), an acquire takes the word's to the thread, the block's next
barrier to all its threads. Left out on purpose: fences beside relaxed accesses, warp barriers and barriers of a part of the block
order nothing between blocks, nor do blocks order each other that do not run side by side. What is ordered only so is called a race.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx_program import PtxError
from ptx_races import BLOCK_AT, EPOCH_AT, MANY, MANY_BLOCKS, RELEASES_AT, Races
from ptx_runtime import some

if TYPE_CHECKING:
    from ptx_report import Site

__all__ = ["BlockRaces", "Meetings"]

_RELEASES = 7  # of a thread between two barriers, at most
_EPOCHS = (1 << BLOCK_AT - EPOCH_AT) - 1


class Meetings:
    """Methods of Group (ptx_lanes.py), whose lanes these are."""

    def sleep(self, here, after: int, mask) -> None:
        """nanosleep: lanes step aside until they are woken. They wait, though in no barrier."""
        every = np.ones(self.n, bool) if mask is None else mask
        here = every if here is None else here
        self._aside(here, after)
        if some(every & ~here):
            self.goto(after, every & ~here)

    def _aside(self, lanes, after: int) -> None:
        self.pc[lanes] = after
        self.asleep |= lanes
        self.waiting |= lanes
        self.sleeps = self.held = True

    def wake(self) -> None:
        if self.sleeps:
            self.waiting &= ~self.asleep
            self.held = some(self.waiting)
            for b in np.unique(self.pc[self.asleep]).tolist():
                self.goto(b, self.asleep & (self.pc == b))
            self.asleep[:] = False
            self.sleeps = False

    def halve(self, b: int, mask):
        """Of the lanes at an arrival those that go now; the other blocks' come a round later."""
        if self.m.order == "lockstep" and not self.m.races:
            return mask
        slots = np.unique(self.slot[mask])
        if len(slots) == 1:
            return mask
        middle = slots[len(slots) // 2]
        go = mask & ((self.slot >= middle) if self.m.order == "warps-reverse" else (self.slot < middle))
        self._aside(mask & ~go, b)
        return go

    def ld_acquire(self, a, offset, size, space, mask, olds, site: Site):
        """One value, like `ld`, and with it what was known to those who released it. Mutants see the end of every wait."""
        m = self.m
        m.report.sites.add(site)
        memory, at, lanes = self.find(a, offset, size, space, mask, False, atomic=True)
        v = olds[0].copy().view(f"u{size}") if lanes is not None else np.empty(self.n, f"u{size}")
        v[slice(None) if lanes is None else lanes] = memory[size][at]
        if m.without == site:
            v[slice(None) if lanes is None else lanes] = -1 & (1 << 8 * size) - 1
        else:
            self.meet(memory, at * size, lanes, True, False)
        return (v,)

    def st_release(self, a, offset, size, values, space, mask, site: Site) -> None:
        m = self.m
        m.report.sites.add(site)
        if m.without == site:
            return
        memory, at, lanes = self.find(a, offset, size, space, mask, True, atomic=True)
        memory[size][at] = values[0] if lanes is None else values[0][lanes]
        if m.clocks is not None and memory is m.views:
            m.clocks.forget(at * size)
        self.meet(memory, at * size, lanes, False, True)

    def meet(self, memory, byte, lanes, acquire: bool, release: bool) -> None:
        """What the threads at words of global memory take from there and leave there."""
        clocks = self.m.clocks
        if clocks is None or memory is not self.m.views:
            return
        lanes = self.index if lanes is None else lanes
        for lane, word in zip(lanes.tolist(), byte.tolist()):
            who = int(self.slot[lane]), int(self.lin[lane])
            if acquire:
                clocks.acquire(who, word)
            if release:
                clocks.release(who, word, int(self.me[lane]))
                self.me[lane] += np.int64(1) << RELEASES_AT


class Clocks:
    """What each block knows of each: all of its accesses before a barrier, and one thread's up to a release behind that barrier."""

    def __init__(self, numbers: np.ndarray):
        n = len(numbers)
        self.slot = np.full((1 << 16) + 2, -1, np.int64)  # of a block's number
        self.slot[numbers] = np.arange(n)
        self.seen = np.zeros((n, n), np.int64)
        self.own: dict[tuple[int, int], np.ndarray] = {}
        """(block, thread) -> what that thread alone learnt since its block's last barrier."""
        self.words: dict[int, np.ndarray] = {}
        """Byte of a word -> what was known to all who released it."""

    def acquire(self, who: tuple[int, int], word: int) -> None:
        if word in self.words:
            mine = self.own.get(who)
            self.own[who] = self.words[word].copy() if mine is None else np.maximum(mine, self.words[word])

    def release(self, who: tuple[int, int], word: int, me: int) -> None:
        """Atomics carry on what earlier ones left: the words of others stay."""
        block, thread = who
        known = np.maximum(self.seen[block], self.own[who]) if who in self.own else self.seen[block].copy()
        releases = me >> RELEASES_AT & _RELEASES
        if releases == _RELEASES:
            raise NotImplementedError(f"{_RELEASES} releases of one thread without a barrier of its block between them")
        known[block] = max(int(known[block]), (me >> EPOCH_AT & _EPOCHS) << 13 | releases << 10 | thread)
        self.words[word] = np.maximum(self.words[word], known) if word in self.words else known

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks meet: what one of them learnt all know."""
        for who in [w for w in self.own if blocks[w[0]]]:
            self.seen[who[0]] = np.maximum(self.seen[who[0]], self.own.pop(who))

    def forget(self, byte: np.ndarray, size: int = 1) -> None:
        """A plain store ends what atomics left there."""
        if self.words and len(byte) and byte.max() + size > min(self.words) and byte.min() <= max(self.words):
            for word in [w for w in self.words if ((byte <= w) & (w < byte + size)).any()]:
                del self.words[word]

    def covers(self, before: np.ndarray, me: np.ndarray) -> np.ndarray:
        """Whether those who access now know of the accesses before, of other blocks."""
        mine, other, thread = self.slot[me >> BLOCK_AT], self.slot[before >> BLOCK_AT], me & 0x3FF
        seen = np.where(other < 0, 0, self.seen[mine, other])
        for (block, t), known in self.own.items():
            k = (mine == block) & (thread == t) & (other >= 0)
            seen[k] = np.maximum(seen[k], known[other[k]])
        epoch, known_epoch = before >> EPOCH_AT & _EPOCHS, seen >> 13
        same = ((seen ^ before) & 0x3FF == 0) & (seen >> 10 & _RELEASES >= before >> RELEASES_AT & _RELEASES) & (before & MANY == 0)
        return (epoch < known_epoch) | ((epoch == known_epoch) & same)


class BlockRaces(Races):
    """Of global memory, with order between blocks. What several blocks read has a row of its own: the last read of each."""

    def __init__(self, nbytes: int, granule: int, what: str):
        super().__init__(nbytes, granule, what)
        self.row = np.zeros(len(self.reads), np.int64)

    def enter(self, numbers: np.ndarray) -> Clocks:
        """Other blocks start; nothing orders them after those that ran."""
        self.reads[self.row != 0] |= MANY_BLOCKS
        self.row[:] = 0
        self.columns = len(numbers) + 1  # the last one is for blocks that ran before these
        self.used = 1
        self.rows = np.zeros((64, self.columns), np.int64)
        self.clocks = Clocks(numbers)
        return self.clocks

    def conflict(self, before, me):
        bad = super().conflict(before, me)
        k = (bad & ((before ^ me) >> BLOCK_AT != 0) & (before & MANY_BLOCKS == 0)).nonzero()[0]
        if len(k):
            bad[k] = ~self.clocks.covers(before[k], me[k])
        return bad

    def check(self, group, byte, size, lanes, write, memory, values):
        super().check(group, byte, size, lanes, write, memory, values)
        if write:
            self.clocks.forget(byte, size)

    def readers(self, at, me):
        bad = super().readers(at, me)
        k = self.row[at].nonzero()[0]
        if len(k):
            found = self.rows[self.row[at[k]]]
            bad[k] = self.conflict(found.reshape(-1), np.repeat(me[k], self.columns)).reshape(found.shape).any(1)
        return bad

    def read(self, at, me) -> None:
        alone = self.row[at] == 0
        if alone.any():
            g, mine = at[alone], me[alone]
            first = self.reads[g]
            self.reads[g] = np.where(first == 0, mine, first)
            others = (self.reads[g] ^ mine) >> BLOCK_AT != 0
            if others.any():
                self._make_rows(np.unique(g[others]))
                alone = self.row[at] == 0
        if alone.any():
            self.note(self.reads, at[alone], me[alone])
        if not alone.all():
            at, me = at[~alone], me[~alone]
            self.note(self.rows.reshape(-1), self.row[at] * self.columns + self.clocks.slot[me >> BLOCK_AT], me)

    def _make_rows(self, granules) -> None:
        rows = np.arange(self.used, self.used + len(granules))
        self.used += len(granules)
        if self.used > len(self.rows):
            more = max(self.used, 2 * len(self.rows)) - len(self.rows)
            self.rows = np.concatenate([self.rows, np.zeros((more, self.columns), np.int64)])
        self.row[granules] = rows
        last = self.reads[granules]
        self.rows[rows, self.clocks.slot[last >> BLOCK_AT]] = last  # -1, the last column, for blocks that ran before
