"""Lanes that are scheduled together: their registers, control flow and accesses to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import bitwise_or, count_nonzero, where

from ptx_meetings import Meetings
from ptx_program import PtxError
from ptx_races import BLOCK_AT, EPOCH_AT, SYNC_AT, views
from ptx_report import Site
from ptx_runtime import every, some
from ptx_warps import Warps, bits

if TYPE_CHECKING:
    from ptx_machine import Machine

__all__ = ["Group"]

SHARED_WINDOW = 0x0100_0000_0000  # generic addresses
LOCAL_WINDOW = 0x0200_0000_0000
WINDOW = 0x0080_0000_0000
END = 1 << 30  # a block past the last one
LOG2 = {1 << k: k for k in range(5)}

_ATOMIC = {
    "add": lambda a, b: a + b, "min": min, "max": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip


class Constants(dict):
    """(dtype, bytes) of a number -> a vector of it."""

    def __init__(self, n: int):
        self.n = n

    def __missing__(self, key):
        self[key] = np.full(self.n, np.frombuffer(key[1], key[0])[0])
        return self[key]


class Group(Warps, Meetings):
    """Lanes that are scheduled together: of every running block all lanes, or one warp's."""

    def __init__(self, m: Machine, warps: range, ctas: list[tuple[int, int, int]]):
        self.m = m
        nb, per = len(ctas), len(warps) * 32
        self.n = nb * per
        lin = np.tile(np.arange(warps.start * 32, warps.stop * 32, dtype=np.int64), nb)
        self.lin = lin
        self.slot = np.repeat(np.arange(nb, dtype=np.int64), per)
        self.lane = (lin & 31).astype(np.int64)
        self.row = np.arange(self.n, dtype=np.int64) & ~31  # of the first lane of each lane's warp
        self.shared_at = self.slot * m.shared_stride
        bx, by, bz = m.block
        t = {"x": lin % bx, "y": lin // bx % by, "z": lin // (bx * by)}
        cta = np.array(ctas, np.int64).reshape(-1, 3)
        self.special = {}
        for i, c in enumerate("xyz"):
            self.special[f"%tid.{c}"] = t[c].astype(np.uint32)
            self.special[f"%ctaid.{c}"] = np.repeat(cta[:, i], per).astype(np.uint32)
        self.special["%laneid"] = self.lane.astype(np.uint32)
        self.special["%warpid"] = (lin >> 5).astype(np.uint32)
        ones = np.uint64(1) << (lin & 31).astype(np.uint64)
        for name, v in (("eq", ones), ("lt", ones - 1), ("le", 2 * ones - 1), ("ge", -(ones.astype(np.int64))), ("gt", -2 * ones.astype(np.int64))):
            self.special[f"%lanemask_{name}"] = (v.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
        self.alive = lin < m.threads
        self.full = bool(self.alive.all())
        self.places: dict[int, np.ndarray | None] = {0: None if self.full else self.alive.copy()}
        """Block -> the lanes that are to run it, None while all are alive and together."""
        self.waiting = np.zeros(self.n, bool)
        self.held = False  # whether any lane waits
        self.asleep = np.zeros(self.n, bool)  # of those that wait: until the next round
        self.sleeps = False
        self.pc = np.zeros(self.n, np.int32)  # of those asleep: where they go on
        self.bar = np.zeros(self.n, np.int32)  # block index of the barrier a lane waits in
        self.bar_id = np.zeros(self.n, np.int32)
        self.bar_count = np.zeros(self.n, np.int32)
        self.bar_value = np.zeros(self.n, bool)
        poison = {w: np.full(self.n, -1, f"i{w // 8}").view(f"u{w // 8}") for w in (8, 16, 32, 64)}
        poison[1] = np.ones(self.n, bool)
        self.poison = poison
        kept = {"pred": poison[1], "f4": poison[32].view("f4"), "f8": poison[64].view("f8"), **{f"u{w // 8}": poison[w] for w in (8, 16, 32, 64)}}
        self.R = [kept[home] for home in m.kernel.translator.homes]
        self.constants = Constants(self.n)
        self.shuffles: dict = {}
        self.exist = np.repeat(bits(self.alive), 32)  # a mask may name lanes that the block does not have
        self.async_queue: list = []
        bytes_local = m.kernel.program.local_bytes
        self.local_stride = -(-bytes_local // 16) * 16 + 16
        self.local = np.full(self.n * self.local_stride, 0xFF, np.uint8) if bytes_local else None
        if m.races:
            self.me = (np.repeat(m.numbers(ctas), per) << BLOCK_AT) + (np.int64(1) << EPOCH_AT) + lin
        self.index = np.arange(self.n, dtype=np.int64)

    def const(self, v):
        """A vector of one value."""
        return self.constants[v.dtype.char, v.tobytes()]

    def run(self) -> None:
        """Until every lane waits or has ended. Those with the least program counter go first."""
        m, code, places, R = self.m, self.m.kernel.translator, self.places, self.R
        while places:
            b = min(places)
            mask = places.pop(b)
            if mask is not None:
                if b < code.n and code.syncs[b]:
                    b, mask = self.rendezvous(b, mask)
                    if mask is None:
                        return
                if b >= code.n:
                    self.alive &= ~mask
                    self.full = False
                    continue
                if self.full and not self.held and not places:
                    mask = None
            elif b >= code.n:
                self.alive[:] = False
                self.full = False
                return
            m.fuel -= 1
            if m.fuel < 0:
                raise PtxError("the kernel does not end (does a block or warp wait for another?)")
            step, written = code.steps[b] or code.step(b)
            if mask is None:
                m.report.instructions += code.sizes[b] * self.n
                for k, v in zip(written, step(self, R, None)):
                    R[k] = v
            else:
                m.report.instructions += code.sizes[b] * int(count_nonzero(mask))
                for k, v in zip(written, step(self, R, mask)):
                    R[k] = where(mask, v, R[k])

    def rendezvous(self, b, mask):
        """Lanes at a warp-wide instruction wait while others of their warp can still come: what runs instead. No mask: they sleep."""
        syncs, n, places = self.m.kernel.translator.syncs, self.m.kernel.translator.n, self.places
        if not places and not self.sleeps and syncs[b] == "warp":
            return b, mask
        places[b] = mask
        ready = np.logical_or.reduce(list(places.values()))
        if self.sleeps:
            held = np.repeat(self.asleep.reshape(-1, 32).any(1), 32)
        for p in sorted(places):
            here = places[p]
            if p >= n or not syncs[p]:
                return p, places.pop(p)
            if syncs[p] == "arrival":
                return p, self.halve(p, places.pop(p))
            elsewhere = (ready & ~here).reshape(-1, 32).any(1)
            complete = here & ~np.repeat(elsewhere, 32)
            if self.sleeps:
                complete &= ~held
            if some(complete):
                return p, self.take(p, complete)
        if self.sleeps:
            ready = ready & ~held
            if not some(ready):
                return b, None
            b = min(p for p, here in places.items() if some(here & ready))
            mask = places[b] & ready
        # All wait: for lanes of one warp in different places, with masks of their own perhaps. The first that is complete goes.
        return b, self.take(b, mask)

    def take(self, b, lanes):
        """Some of those at a block, which the others do not leave."""
        rest = self.places.pop(b) & ~lanes
        if some(rest):
            self.places[b] = rest
        return lanes

    # Control, called at the end of each basic block ----------------------------------------------------------------------

    def goto(self, b, mask) -> None:
        self.places[b] = self.places[b] | mask if b in self.places else mask

    def branch(self, taken, target, other, mask) -> None:
        if mask is not None:
            taken = taken & mask
        if not some(taken):
            return self.goto(other, mask)
        if target < other:
            self.m.report.repeated.add(other - 1)
        stay = ~taken if mask is None else mask & ~taken
        if not some(stay):
            return self.goto(target, mask)
        self.goto(target, taken)
        self.goto(other, stay)

    def switch(self, index, targets, mask) -> None:
        here = np.ones(self.n, bool) if mask is None else mask
        chosen = index[here]
        if chosen.max() >= len(targets):
            raise PtxError("brx.idx: index outside its table")
        for k in np.unique(chosen).tolist():
            self.goto(targets[k], here & (index == k))

    def leave(self, gone, other, mask) -> None:
        """Ends lanes; the others go on."""
        if gone is None:
            self.goto(END, mask)
        else:
            here = np.ones(self.n, bool) if mask is None else mask
            for b, lanes in ((END, gone & here), (other, here & ~gone)):
                if some(lanes):
                    self.goto(b, lanes)

    def wait(self, b, bar_id, count, value, mask) -> None:
        here = mask
        self.m.report.sites.add((b, -1))
        if self.m.without == (b, -1):
            return self.goto(b + 1, mask)
        if here is None:
            here = np.ones(self.n, bool)
        self.waiting |= here
        self.held = True
        self.bar[here] = b
        self.bar_id[here] = bar_id[here] if isinstance(bar_id, np.ndarray) else bar_id
        self.bar_count[here] = count[here] if isinstance(count, np.ndarray) else count
        if value is not None:
            self.bar_value[here] = value[here]

    def arrive(self, bar_id, count, mask) -> None:
        """bar.arrive: counted, not waited for."""
        for lane in np.nonzero(np.ones(self.n, bool) if mask is None else mask)[0]:
            self.m.arrived[int(self.slot[lane]), int(bar_id[lane])] += 1

    def trap(self, text, hit, other, mask) -> None:
        if hit is None or hit.any():
            raise PtxError(f"the kernel stops itself: {text}")
        self.goto(other, mask)

    def release(self, lanes, b: int) -> None:
        self.waiting &= ~lanes
        self.held = some(self.waiting)
        if self.m.races:
            self.me[lanes] = (self.me[lanes] & ~np.int64((1 << EPOCH_AT) - (1 << SYNC_AT))) + (np.int64(1) << EPOCH_AT)
        self.goto(b + 1, None if self.full and every(lanes) else lanes)

    # Memory -------------------------------------------------------------------------------------------------------------

    @staticmethod
    def both(mask, p):
        return p if mask is None else p & mask

    def guarded(self, mask, base, site):
        """The lanes of an access under a predicate, of those in `base`."""
        m = self.m
        if m.without == site:
            return base
        m.report.sites.add(site)
        if site not in m.report.masked and not every(mask if base is None else mask == base):
            m.report.masked.add(site)
        return mask

    def ld(self, a, offset, size, count, space, mask, olds=None):
        """`count` values of `size` bytes at address a + offset, as unsigned vectors; lanes outside mask keep `olds`, or anything."""
        memory, at, lanes = self.find(a, offset, size * count, space, mask, False)
        if count == 1:
            got = (memory[size].take(at),)
        else:
            got = memory[size].reshape(-1, count).take(at, axis=0).T
        if lanes is None:
            return got if count == 1 else tuple(np.ascontiguousarray(got))
        out = []
        for k, new in enumerate(got):
            v = np.empty(self.n, new.dtype) if olds is None else olds[k].copy().view(new.dtype)
            v[lanes] = new
            out.append(v)
        return out

    def st(self, a, offset, size, values, space, mask) -> None:
        memory, at, lanes = self.find(a, offset, size * len(values), space, mask, True, values)
        if len(values) == 1:
            memory[size][at] = values[0] if lanes is None else values[0][lanes]
        else:
            v = np.stack(values, 1)
            memory[size].reshape(-1, len(values))[at] = v if lanes is None else v[lanes]

    def find(self, a, offset, size, space, mask, write, values=None, atomic=False):
        """(typed views, indices in units of `size`, lanes or None for all): checked, counted, watched for races."""
        m = self.m
        if a.dtype.itemsize == 4:
            a = a.astype(np.int64)
            if offset:
                a = a + offset & 0xFFFFFFFF
        else:
            a = a.view(np.int64)
            if offset:
                a = a + offset
        lanes = None
        if mask is not None:
            lanes = mask.nonzero()[0]
            if len(lanes) == self.n:
                lanes = None
            else:
                a = a.take(lanes)
        if space == "generic":
            space = self.window(a)
            a = a - {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0}[space]
        what = "load" if not write else "atomic" if atomic else "store"
        if size > 1 and bitwise_or.reduce(a) & size - 1:
            self.fault(f"misaligned {size}-byte {space} {what}", a, lanes, (a & (size - 1)) != 0)
        if space == "shared":
            self.inside(a, size, m.shared_bytes, "shared", what, lanes)
            if m.count and not atomic:
                m.count_shared(self, a, size, lanes)
            byte = a + (self.shared_at if lanes is None else self.shared_at.take(lanes))
            memory = m.shared_views
            if m.races and not atomic:
                m.shared_races.check(self, byte, size, lanes, write, memory, values)
        elif space == "local":
            self.inside(a, size, m.kernel.program.local_bytes, "local", what, lanes)
            byte = a + (self.index if lanes is None else lanes) * self.local_stride
            memory = views(self.local)
        else:
            byte = m.resolve(a)
            ok = m.valid[size].take(byte >> LOG2[size], mode="clip")
            if not every(ok):
                self.fault(f"{what} of {size} bytes outside every buffer", a, lanes, ~ok)
            if space != "const":
                if m.count and (write or not atomic):  # how often a wait looks says nothing
                    m.count_global(self, byte, size, lanes, what)
                if write and len(a):
                    m.moves += 1
                if write and m.read_only is not None and m.read_only[byte].any():
                    self.fault(f"{what} to an argument that only is read", a, lanes, m.read_only[byte])
                if m.races and not atomic:
                    m.global_races.check(self, byte, size, lanes, write, m.views, values)
            memory = m.views
        return memory, byte >> LOG2[size], lanes

    def inside(self, a, size, total, space, what, lanes) -> None:
        """That addresses lie in a space of so many bytes; as unsigned numbers negative ones are too large."""
        bad = a.view(np.uint64) > total - size if total >= size else np.ones(len(a), bool)
        if some(bad):
            self.fault(f"{what} outside {total} bytes of {space} memory", a, lanes, bad)

    def window(self, a) -> str:
        kinds = {"shared": (a >= SHARED_WINDOW) & (a < SHARED_WINDOW + WINDOW), "local": (a >= LOCAL_WINDOW) & (a < LOCAL_WINDOW + WINDOW)}
        for name, inside in kinds.items():
            if inside.any():
                if not inside.all():
                    raise NotImplementedError("one generic access to several address spaces")
                return name
        return "global"

    def fault(self, what, a, lanes, bad):
        i = int(np.nonzero(bad)[0][0])
        lane = i if lanes is None else int(lanes[i])
        cta = tuple(int(self.special[f"%ctaid.{c}"][lane]) for c in "xyz")
        at = int(a[i])
        where = self.m.nearest(at) if at > WINDOW * 4 else f"address {at}"
        raise PtxError(f"{what}: {where}, thread {int(self.lin[lane])} of block {cta}")

    def atom(self, a, offset, size, kind, type_, values, space, mask, old, order: str, site: Site):
        """In lane order; returns what was there before."""
        if order in ("release", "both"):
            self.m.report.sites.add(site)
            if self.m.without == site:
                return old.view(f"u{size}")
        memory, at, lanes = self.find(a, offset, size, space, mask, True, atomic=True)
        view = memory[size].view(type_) if type_ != "bf16" else memory[size]
        if order:
            self.meet(memory, at * size, lanes, order != "release", order != "acquire")
        values = [v if lanes is None else v[lanes] for v in values]
        out = old.copy().view(f"u{size}").view(view.dtype)
        lanes = self.index if lanes is None else lanes
        for k, (i, lane) in enumerate(zip(at.tolist(), lanes.tolist())):
            was = view[i]
            x = values[0][k]
            out[lane] = was
            if kind == "cas":
                if was == x:
                    view[i] = values[1][k]
            elif kind == "exch":
                view[i] = x
            elif type_ == "bf16":
                raise NotImplementedError("bf16 atomics")
            elif kind == "inc":
                view[i] = 0 if was >= x else was + 1
            elif kind == "dec":
                view[i] = x if was == 0 or was > x else was - 1
            else:
                view[i] = _ATOMIC[kind](was, x)
        return out.view(f"u{size}")

    def cp_async(self, dst, dst_offset, src, src_offset, size, source_size, mask):
        """The copy happens at the wait: what reads earlier reads poison."""
        here = np.ones(self.n, bool) if mask is None else mask
        n = np.full(self.n, size, np.int64) if source_size is None else source_size.astype(np.int64)
        whole, none = here & (n == size), here & (n == 0)
        if (here & ~whole & ~none).any():
            raise NotImplementedError("cp.async with a partial source")
        jobs = []
        if whole.any():
            memory, at, lanes = self.find(src, src_offset, size, "global", whole, False)
            jobs.append((whole, memory[size][at] if size < 16 else memory[16][at]))
        if none.any():
            jobs.append((none, None))

        def go():
            for lanes, data in jobs:
                k = int(lanes.sum())
                rows = np.zeros((k, size), np.uint8) if data is None else np.ascontiguousarray(data).view(np.uint8).reshape(k, size)
                words = rows.view(np.uint32).reshape(k, size // 4)
                full = [self._padded(words[:, j], lanes) for j in range(size // 4)]
                self.st(dst, dst_offset, 4, full, "shared", lanes)

        self.async_queue.append(go)

    def _padded(self, v, lanes):
        out = np.zeros(self.n, np.uint32)
        out[lanes] = v
        return out

    def commit(self) -> None:
        self.async_queue.append("commit")

    def wait_group(self, keep: int, everything: bool, site: Site) -> None:
        self.m.report.sites.add(site)
        if self.m.without == site:
            return
        queue = self.async_queue
        while queue and (everything or queue.count("commit") > keep):
            job = queue.pop(0)
            if job != "commit":
                job()
