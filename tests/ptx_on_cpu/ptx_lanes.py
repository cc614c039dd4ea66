"""Lanes that are scheduled together: their registers, control flow and accesses to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx_meetings import Meetings
from ptx_program import PtxError
from ptx_races import BLOCK_AT, EPOCH_AT, SYNC_AT, views
from ptx_report import Site
from ptx_warps import Warps

if TYPE_CHECKING:
    from ptx_machine import Machine

__all__ = ["Group"]

SHARED_WINDOW = 0x0100_0000_0000  # generic addresses
LOCAL_WINDOW = 0x0200_0000_0000
WINDOW = 0x0080_0000_0000

_ATOMIC = {
    "add": lambda a, b: a + b, "min": min, "max": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip


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
        self.pc = np.zeros(self.n, np.int32)
        self.at: int | None = 0 if self.full else None  # the common program counter, while all lanes are alive and together
        self.waiting = np.zeros(self.n, bool)
        self.asleep = np.zeros(self.n, bool)  # of those that wait: until the next round
        self.sleeps = False
        self.bar = np.zeros(self.n, np.int32)  # block index of the barrier a lane waits in
        self.bar_id = np.zeros(self.n, np.int32)
        self.bar_count = np.zeros(self.n, np.int32)
        self.bar_value = np.zeros(self.n, bool)
        poison = {w: np.full(self.n, -1, f"i{w // 8}").view(f"u{w // 8}") for w in (8, 16, 32, 64)}
        poison[1] = np.ones(self.n, bool)
        self.R = [poison[w] for w in m.kernel.program.widths]
        self.poison = poison
        self.constants: dict = {}
        self.async_queue: list = []
        bytes_local = m.kernel.program.local_bytes
        self.local_stride = -(-bytes_local // 16) * 16 + 16
        self.local = np.full(self.n * self.local_stride, 0xFF, np.uint8) if bytes_local else None
        if m.races:
            self.me = (np.repeat(m.numbers(ctas), per) << BLOCK_AT) + (np.int64(1) << EPOCH_AT) + lin
        self.index = np.arange(self.n, dtype=np.int64)

    def const(self, v):
        """A vector of one value."""
        key = (v.dtype.char, v.tobytes())
        if key not in self.constants:
            self.constants[key] = np.full(self.n, v)
        return self.constants[key]

    def run(self) -> None:
        """Until every lane waits or has ended."""
        m, code = self.m, self.m.kernel.translator
        n_blocks = code.n
        while True:
            if self.at is not None:
                b = self.at
                if b >= n_blocks:
                    self.alive[:] = False
                    self.full, self.at = False, None
                    return
                mask = None
            else:
                ready = self.alive & ~self.waiting
                if not ready.any():
                    return
                b = int(self.pc[ready].min())
                mask = ready & (self.pc == b)
                if b < n_blocks and code.syncs[b]:
                    b, mask = self.rendezvous(b, mask, ready)
                    if mask is None:
                        return
                if b >= n_blocks:
                    self.alive &= ~mask
                    self.full = False
                    continue
                if self.full and mask.all():
                    self.at, mask = b, None
            m.fuel -= 1
            if m.fuel < 0:
                raise PtxError("the kernel does not end (does a block or warp wait for another?)")
            m.report.instructions += code.sizes[1][b] * self.n if mask is None else code.sizes[0][b] * int(mask.sum())
            code.function(b, mask is not None)(self, self.R, mask)

    def rendezvous(self, b, mask, ready):
        """Lanes at a warp-wide instruction wait while others of their warp can still come: what runs instead. No mask: they sleep."""
        syncs, n = self.m.kernel.translator.syncs, self.m.kernel.translator.n
        if self.sleeps:
            held = np.repeat(self.asleep.reshape(-1, 32).any(1), 32)
        for p in np.unique(self.pc[ready]).tolist():
            here = ready & (self.pc == p)
            if p >= n or not syncs[p]:
                return p, here
            if syncs[p] == "arrival":
                return p, self.halve(here)
            elsewhere = (ready & ~here).reshape(-1, 32).any(1)
            complete = here & ~np.repeat(elsewhere, 32)
            if self.sleeps:
                complete &= ~held
            if complete.any():
                return p, complete
        if self.sleeps:
            ready = ready & ~held
            if not ready.any():
                return b, None
            b = int(self.pc[ready].min())
            mask = ready & (self.pc == b)
        # All wait: for lanes of one warp in different places, with masks of their own perhaps. The first that is complete goes.
        return b, mask

    # Control, called at the end of each basic block ----------------------------------------------------------------------

    def spread(self) -> None:
        """From one program counter to one a lane."""
        if self.at is not None:
            self.pc[:] = self.at
            self.at = None

    def goto(self, b, mask) -> None:
        if mask is None:
            self.at = b
        else:
            self.pc[mask] = b

    def branch(self, taken, target, other, mask) -> None:
        if target < other and (taken if mask is None else taken & mask).any():
            self.m.report.repeated.add(other - 1)
        if mask is None:
            k = int(np.count_nonzero(taken))
            if k == self.n:
                self.at = target
            elif k == 0:
                self.at = other
            else:
                self.at = None
                self.pc = np.where(taken, np.int32(target), np.int32(other))
        else:
            self.pc[mask] = np.where(taken[mask], target, other)

    def switch(self, index, targets, mask) -> None:
        if (index[mask] if mask is not None else index).max() >= len(targets):
            raise PtxError("brx.idx: index outside its table")
        self.spread()
        chosen = np.asarray(targets, np.int32)[np.minimum(index, len(targets) - 1)]
        self.pc = chosen if mask is None else np.where(mask, chosen, self.pc)

    def leave(self, gone, other, mask) -> None:
        """Ends lanes; the others go on."""
        if mask is None and gone is None:
            self.at = 1 << 30
            return
        self.spread()
        gone = mask if gone is None else gone if mask is None else gone & mask
        self.pc = np.where(gone, np.int32(1 << 30), self.pc)
        stay = ~gone if mask is None else mask & ~gone
        self.pc[stay] = other

    def wait(self, b, bar_id, count, value, mask) -> None:
        here = mask
        self.m.report.sites.add((b, -1))
        if self.m.without == (b, -1):
            return self.goto(b + 1, mask)
        self.spread()
        if here is None:
            here = np.ones(self.n, bool)
        self.waiting |= here
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
        self.pc[lanes] = b + 1
        if self.m.races:
            self.me[lanes] = (self.me[lanes] & ~np.int64((1 << EPOCH_AT) - (1 << SYNC_AT))) + (np.int64(1) << EPOCH_AT)
        if self.full and lanes.all():
            self.at = b + 1

    # Memory -------------------------------------------------------------------------------------------------------------

    def guarded(self, mask, base, site):
        """The lanes of an access under a predicate, of those in `base`."""
        m = self.m
        if m.without == site:
            return base
        m.report.sites.add(site)
        if site not in m.report.masked and not (mask.all() if base is None else (mask == base).all()):
            m.report.masked.add(site)
        return mask

    def ld(self, a, offset, size, count, space, mask, olds):
        """`count` values of `size` bytes at address a + offset, as unsigned vectors; lanes outside mask keep `olds`."""
        memory, at, lanes = self.find(a, offset, size * count, space, mask, False)
        if lanes is None:
            got = memory[size].take(at) if count == 1 else memory[size].reshape(-1, count).take(at, axis=0)
            return (got,) if count == 1 else tuple(np.ascontiguousarray(got.T))
        out = []
        got = memory[size].reshape(-1, count).take(at, axis=0)
        for k in range(count):
            v = olds[k].copy().view(f"u{size}")
            v[lanes] = got[:, k]
            out.append(v)
        return tuple(out)

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
        narrow = a.dtype.itemsize == 4
        a = a.astype(np.int64) if narrow else a.view(np.int64)
        if offset:
            a = a + offset
            if narrow:
                a = a & 0xFFFFFFFF
        lanes = None
        if mask is not None:
            lanes = mask.nonzero()[0]
            if len(lanes) == self.n:
                lanes = None
            else:
                a = a[lanes]
        if space == "generic":
            space = self.window(a)
            a = a - {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0}[space]
        what = "load" if not write else "atomic" if atomic else "store"
        if len(a) and (a & (size - 1)).any():
            self.fault(f"misaligned {size}-byte {space} {what}", a, lanes, (a & (size - 1)) != 0)
        if space == "shared":
            bad = (a < 0) | (a > m.shared_bytes - size)
            if bad.any():
                self.fault(f"{what} outside {m.shared_bytes} bytes of shared memory", a, lanes, bad)
            if m.count and not atomic:
                m.count_shared(self, a, size, lanes)
            byte = a + (self.shared_at if lanes is None else self.shared_at[lanes])
            memory = m.shared_views
            if m.races and not atomic:
                m.shared_races.check(self, byte, size, lanes, write, memory, values)
        elif space == "local":
            limit = m.kernel.program.local_bytes
            bad = (a < 0) | (a > limit - size)
            if bad.any():
                self.fault(f"{what} outside {limit} bytes of local memory", a, lanes, bad)
            byte = a + (self.index if lanes is None else lanes) * self.local_stride
            memory = views(self.local)
        else:
            byte = m.resolve(a)
            ok = m.valid[size].take(byte // size, mode="clip")
            if not ok.all():
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
        return memory, byte // size, lanes

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
