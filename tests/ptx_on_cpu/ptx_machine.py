"""A PTX emulator in NumPy, for tests: runs what Triton or nvcc compiled, without a GPU. Never a measure of a GPU's speed.

Many blocks run side by side, and lanes with the same program counter step together: each basic block becomes one Python
function on vectors (`ptx_code`). Three orders: `lockstep` steps whole blocks; `warps` and `warps-reverse` let one warp run until
it waits or ends, so that a missing barrier gives a wrong result. `races=True` also names unordered accesses to one word (in any
order of execution, write after read included).

Every global access must lie in an argument's array, every shared access in the block's shared memory; both are aligned. Shared
and local memory and registers start as 0xFF (NaN, -1). Barriers must be reached by all of a block's threads.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, product

import numpy as np

from ptx_code import Translator
from ptx_program import WIDTH, Module, Program, PtxError

__all__ = ["ORDERS", "Kernel", "Launch", "PtxError", "Site", "Sparse", "Traffic"]

ORDERS = ("lockstep", "warps", "warps-reverse")
BASE = 0x7F00_0000_0000  # of global memory
GUARD = 512  # bytes between two buffers; the buffers themselves are aligned like CUDA's allocator does
SHARED_WINDOW = 0x0100_0000_0000  # generic addresses
LOCAL_WINDOW = 0x0200_0000_0000
WINDOW = 0x0080_0000_0000
LANES = 16384  # that step together at most
FUEL = 3_000_000  # basic blocks; a kernel that spins ends here

_MANY_WARP, _MANY = np.int64(1 << 10), np.int64(1 << 11)
_MANY_BLOCKS = np.int64(1 << 12)
_EPOCH_AT, _BLOCK_AT = 30, 46


Site = tuple[int, int]
"""An instruction: its block, its place there; -1 for the one that ends the block."""


@dataclass(frozen=True)
class Sparse:
    """A huge array of which only pieces exist: byte offset -> array. For offsets past 2^31 elements."""

    nbytes: int
    pieces: dict[int, np.ndarray]


@dataclass
class Traffic:
    """What one buffer saw. A request is one instruction of one warp."""

    nbytes: int = 0
    load_requests: int = 0
    load_bytes: int = 0
    """Different bytes of each request, added up."""
    load_sectors: int = 0
    """32-byte pieces a request touches, added up."""
    store_requests: int = 0
    store_bytes: int = 0
    store_sectors: int = 0
    atomics: int = 0


@dataclass
class Launch:
    """What a launch did."""

    traffic: dict[str, Traffic] = field(default_factory=dict)
    """By parameter name."""
    shared_requests: int = 0
    shared_wavefronts: int = 0
    instructions: int = 0
    """Thread instructions issued, predicated off or not."""
    barriers: int = 0
    races: list[str] = field(default_factory=list)
    sites: set[Site] = field(default_factory=set)
    """Barriers, warp barriers, waits for copies, shuffles and accesses under a predicate that were executed."""
    masked: set[Site] = field(default_factory=set)
    """Accesses that a predicate kept some lane from."""
    repeated: set[int] = field(default_factory=set)
    """Blocks whose branch back was taken: loops that went round again."""


class Kernel:
    """One entry point, ready to be launched."""

    def __init__(self, text: str | Module, name: str | None = None):
        module = Module(text) if isinstance(text, str) else text
        self.program: Program = module.program(name)
        self.translator = Translator(self.program)
        self.granules = {space: self._granule(space) for space in ("global", "shared")}

    def _granule(self, space: str) -> int:
        """The least bytes of an access: races are looked for at this grain."""
        other = {"global": "shared", "shared": "global"}[space]
        found = {4}
        for b in self.program.blocks:
            for i in b.body:
                if i.op[0] in ("ld", "st") and not {other, "local", "param", "const"} & set(i.op):
                    found.add(WIDTH[i.type] // 8)
        return min(found)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence,
        shared: int = 0,
        *,
        order: str = "lockstep",
        memory: Iterable[np.ndarray] = (),
        races: bool = False,
        replicas: bool = False,
        count: bool = False,
        blocks: Iterable[tuple[int, int, int]] | None = None,
        names: Sequence[str] = (),
        without: Site | None = None,
    ) -> Launch:
        """Runs the grid and writes results into the arrays.

        Args:
            args: one an entry parameter: an array (passed as a pointer), `Sparse`, int, float, or the bytes of a struct, in which
                addresses inside arrays of `memory` become pointers. Triton's trailing scratch pointers may be left out.
            shared: bytes of dynamic shared memory.
            memory: further arrays reachable by pointers in structs or integers.
            races, count: look for races; count traffic. Both cost time.
            replicas: several lanes may write one word if their float32 differ in the last bits only. Triton keeps copies of a value
                in many lanes; a sum of products ends in an fma on one of two lanes that exchange halves, so copies may differ.
            blocks: run only these blocks of the grid.
            without: leave out this barrier, warp barrier, wait or shuffle, or this access's predicate: a mutant.
            names: of the buffers in `traffic`, in the order of args and memory; parameter names without it.
        """
        if order not in ORDERS:
            raise ValueError(order)
        grid, block = (tuple([*map(int, g), 1, 1][:3]) for g in (grid, block))
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise PtxError(f"grid {grid} cannot be launched")
        threads = block[0] * block[1] * block[2]
        if not 1 <= threads <= (self.program.max_threads or 1024):
            raise PtxError(f"block {block} cannot be launched")
        if self.program.shared_bytes + shared > 227 * 1024:
            raise PtxError(f"{self.program.shared_bytes + shared} bytes of shared memory cannot be launched")
        machine = _Machine(self, grid, block, args, shared, order, list(memory), races, count, names)
        machine.replicas, machine.without = replicas, without
        which = iter(blocks) if blocks is not None else ((x, y, z) for z, y, x in product(*map(range, reversed(grid))))
        step = max(1, LANES // (-(-threads // 32) * 32))
        while some := list(islice(which, step)):
            machine.run(some)
        machine.copy_out()
        return machine.report


class _Group:
    """Lanes that are scheduled together: of every running block all lanes, or one warp's."""

    def __init__(self, m: _Machine, warps: range, ctas: list[tuple[int, int, int]]):
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
            block_id = (cta[:, 0] + m.grid[0] * (cta[:, 1] + m.grid[1] * cta[:, 2])) % (1 << 16) + 1
            self.me = (np.repeat(block_id, per) << _BLOCK_AT) + (np.int64(1) << _EPOCH_AT) + lin
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
        """Lanes at a warp-wide instruction wait while others of their warp can still come: what runs instead."""
        syncs, n = self.m.kernel.translator.syncs, self.m.kernel.translator.n
        for p in np.unique(self.pc[ready]).tolist():
            here = ready & (self.pc == p)
            if p >= n or not syncs[p]:
                return p, here
            elsewhere = (ready & ~here).reshape(-1, 32).any(1)
            complete = here & ~np.repeat(elsewhere, 32)
            if complete.any():
                return p, complete
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
            self.me[lanes] = (self.me[lanes] & ~np.int64((1 << _EPOCH_AT) - (1 << 13))) + (np.int64(1) << _EPOCH_AT)
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
        a = a.astype(np.int64) if a.dtype.itemsize == 4 else a.view(np.int64)
        if offset:
            a = a + offset
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
        what = "atomic" if atomic else "store" if write else "load"
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
            memory = _views(self.local)
        else:
            byte = m.resolve(a)
            ok = m.valid[size].take(byte // size, mode="clip")
            if not ok.all():
                self.fault(f"{what} of {size} bytes outside every buffer", a, lanes, ~ok)
            if space != "const":
                if m.count:
                    m.count_global(self, byte, size, lanes, "atomic" if atomic else what)
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

    def atom(self, a, offset, size, kind, type_, values, space, mask, old):
        """In lane order; returns what was there before."""
        memory, at, lanes = self.find(a, offset, size, space, mask, True, atomic=True)
        view = memory[size].view(type_) if type_ != "bf16" else memory[size]
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

    # Warps --------------------------------------------------------------------------------------------------------------

    def lanes_of_mask(self, mask_reg, mask, what) -> None:
        """The lanes named in the instruction's mask are exactly those that are here."""
        names = mask_reg if isinstance(mask_reg, np.ndarray) else None
        if mask is None:
            if names is None:
                if int(mask_reg) & 0xFFFFFFFF == 0xFFFFFFFF:
                    return
                raise PtxError(f"{what}: mask {int(mask_reg):#x}, but all 32 lanes are here (divergence)")
            if (names == np.uint32(0xFFFFFFFF)).all():
                return
        here = np.ones(self.n, bool) if mask is None else mask
        bits = np.where(here, np.uint64(1) << self.lane.astype(np.uint64), np.uint64(0)).reshape(-1, 32).sum(1).astype(np.uint32)
        have = np.repeat(bits, 32)
        want = np.full(self.n, mask_reg, np.uint32) if names is None else names
        # A mask may name lanes the block does not have.
        exist = np.repeat(
            np.where(self.lin < self.m.threads, np.uint64(1) << self.lane.astype(np.uint64), np.uint64(0)).reshape(-1, 32).sum(1).astype(np.uint32), 32
        )
        bad = here & ((want & exist) != have)
        if bad.any():
            i = int(np.nonzero(bad)[0][0])
            raise PtxError(f"{what}: mask {int(want[i]):#x}, but lanes {int(have[i]):#x} are here (divergence)")

    def shfl(self, kind, v, b, c, member, mask, site):
        """(values, in range)"""
        self.m.report.sites.add(site)
        if self.m.without == site:
            return v, np.ones(self.n, bool)
        self.lanes_of_mask(member, mask, "shfl.sync")
        lane = self.lane
        b = np.asarray(b, np.int64) & 31
        c = np.asarray(c, np.int64)
        seg, clamp = (c >> 8) & 31, c & 31
        most, least = (lane & seg) | (clamp & ~seg), lane & seg
        if kind == "up":
            src = lane - b
            ok = src >= most
        elif kind == "down":
            src = lane + b
            ok = src <= most
        elif kind == "bfly":
            src = lane ^ b
            ok = src <= most
        else:
            src = least | (b & ~seg)
            ok = src <= most
        src = np.where(ok, src, lane) + self.row
        if mask is not None:
            bad = mask & ~mask[src]
            if bad.any():
                raise PtxError(f"shfl.sync reads lane {int(src[bad][0] & 31)}, which does not take part")
        return v[src], np.broadcast_to(ok, (self.n,)).copy()

    def ballot(self, p, mask):
        q = p if mask is None else p & mask
        bits = np.where(q, np.uint64(1) << self.lane.astype(np.uint64), np.uint64(0)).reshape(-1, 32).sum(1).astype(np.uint32)
        return np.repeat(bits, 32)

    def vote(self, kind, p, member, mask):
        if member is not None:
            self.lanes_of_mask(member, mask, "vote.sync")
        if kind == "ballot":
            return self.ballot(p, mask)
        if kind == "any":
            return self.ballot(p, mask) != 0
        if kind == "all":
            return self.ballot(~p, mask) == 0
        return (self.ballot(p, mask) == 0) | (self.ballot(~p, mask) == 0)

    def redux(self, kind, v, member, mask, site):
        self.m.report.sites.add(site)
        if self.m.without == site:
            return v
        self.lanes_of_mask(member, mask, "redux.sync")
        here = np.ones(self.n, bool) if mask is None else mask
        out = v.copy()
        for r in range(0, self.n, 32):
            e = here[r : r + 32]
            if e.any():
                x = v[r : r + 32][e]
                out[r : r + 32] = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[kind].reduce(x)
        return out

    def match_any(self, v, member, mask):
        self.lanes_of_mask(member, mask, "match.sync")
        here = np.ones(self.n, bool) if mask is None else mask
        same = (v.reshape(-1, 32, 1) == v.reshape(-1, 1, 32)) & here.reshape(-1, 1, 32)
        return (same * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(2).astype(np.uint32).reshape(-1)

    def elect(self, member, mask):
        self.lanes_of_mask(member, mask, "elect.sync")
        here = np.ones(self.n, bool) if mask is None else mask
        first = np.where(here, self.lane, 99).reshape(-1, 32).min(1)
        return np.repeat(first, 32).astype(np.uint32), self.lane == np.repeat(first, 32)

    def warp_barrier(self, member, mask, site) -> None:
        self.m.report.sites.add(site)
        if self.m.without == site:
            return
        self.lanes_of_mask(member, mask, "bar.warp.sync")
        if self.m.races:
            step = np.int64(1) << 13
            if mask is None:
                self.me = self.me + step
            else:
                self.me = np.where(mask, self.me + step, self.me)

    def active(self, mask):
        return self.ballot(np.ones(self.n, bool), mask)

    # Tensor cores (sm_75, sm_80) ----------------------------------------------------------------------------------------

    def ldmatrix(self, a, offset, count, trans, mask):
        if mask is not None:
            raise NotImplementedError("ldmatrix in part of a warp")
        rows, _ = self._matrix_rows(a, offset, count, False)
        data = self.m.shared_views[2].reshape(-1, 8)[rows]  # [n, 8]
        tiles = data.reshape(-1, 32, 8)[:, : 8 * count].reshape(-1, count, 8, 8).astype(np.uint32)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        t = np.arange(32)
        return [(tiles[:, j, t >> 2, 2 * (t & 3)] | tiles[:, j, t >> 2, 2 * (t & 3) + 1] << np.uint32(16)).reshape(-1).copy() for j in range(count)]

    def stmatrix(self, a, offset, values, trans, mask):
        if mask is not None:
            raise NotImplementedError("stmatrix in part of a warp")
        count = len(values)
        rows, takes = self._matrix_rows(a, offset, count, True)
        t = np.arange(32)
        out = np.zeros((self.n // 32, 4, 8, 8), np.uint16)
        for j, v in enumerate(values):
            v = v.reshape(-1, 32)
            out[:, j, t >> 2, 2 * (t & 3)], out[:, j, t >> 2, 2 * (t & 3) + 1] = v & np.uint32(0xFFFF), v >> np.uint32(16)
        if trans:
            out = out.transpose(0, 1, 3, 2)
        data = out.reshape(-1, 32, 8).reshape(-1, 8)
        self.m.shared_views[2].reshape(-1, 8)[rows[takes]] = data[takes]

    def _matrix_rows(self, a, offset, count, write):
        takes = self.lane < 8 * count
        addr = (a.astype(np.int64) if a.dtype.itemsize == 4 else a.view(np.int64)) + offset
        bad = takes & ((addr < 0) | (addr > self.m.shared_bytes - 16) | (addr % 16 != 0))
        if bad.any():
            self.fault("matrix row outside shared memory or misaligned", addr, None, bad)
        byte = np.where(takes, addr, 0) + self.shared_at
        if self.m.races:
            lanes = takes.nonzero()[0]
            self.m.shared_races.check(self, byte[lanes], 16, lanes, write, self.m.shared_views, None)
        return byte // 16, takes

    def mma(self, shape, a_type, b_type, A, B, C):
        """D of D = A @ B + C; float32 accumulators. A, B: lists of u32 vectors; C: of float32."""
        t = np.arange(32)
        g, q = t >> 2, t & 3
        W = self.n // 32
        k = int(shape.split("k")[1])
        a, b = np.zeros((W, 16, k)), np.zeros((W, k, 8))
        if a_type == "tf32":
            cut = lambda r: (r & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64).reshape(W, 32)
            for i, r in enumerate(A):
                a[:, g + 8 * (i & 1), q + 4 * (i >> 1)] = cut(r)
            for i, r in enumerate(B):
                b[:, q + 4 * i, g] = cut(r)
        else:
            def half(r, hi):
                h = ((r >> np.uint32(16 * hi)) & np.uint32(0xFFFF)).astype(np.uint16)
                f = h.view(np.float16).astype(np.float64) if a_type == "f16" else (h.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
                return f.reshape(W, 32)

            for i in range(2 * len(A)):
                a[:, g + (8 if i in (2, 3, 6, 7) else 0), 2 * q + (i & 1) + (8 if i >= 4 else 0)] = half(A[i // 2], i & 1)
            for i in range(2 * len(B)):
                b[:, 2 * q + (i & 1) + (8 if i >= 2 else 0), g] = half(B[i // 2], i & 1)
        r = a @ b
        return [
            (r[:, g + (8 if i >= 2 else 0), 2 * q + (i & 1)] + C[i].reshape(W, 32).astype(np.float64)).astype(np.float32).reshape(-1) for i in range(4)
        ]


_ATOMIC = {
    "add": lambda a, b: a + b, "min": min, "max": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip


def _views(data: np.ndarray) -> dict[int, np.ndarray]:
    """Unsigned views by size; 16 bytes as pairs."""
    whole = data[: len(data) // 16 * 16]
    return {1: whole, 2: whole.view(np.uint16), 4: whole.view(np.uint32), 8: whole.view(np.uint64), 16: whole.view([("a", np.uint64), ("b", np.uint64)])}


def _alike(a, b, replicas: bool):
    """Equal bits; or float32 as good as equal beside the largest of them, where `replicas` are allowed."""
    same = a == b
    if replicas and a.dtype.itemsize == 4 and not same.all():
        x, y = a.view(np.float32), b.view(np.float32)
        largest = np.abs(x[np.isfinite(x)]).max(initial=0.0)
        same = same | np.isclose(x, y, rtol=1e-5, atol=2e-6 * largest, equal_nan=True)
    return same


class _Races:
    """Who last wrote and read each granule, and since when: two accesses of which one writes need a barrier between them.

    An access is (block, block barriers passed, warp barriers passed since, thread) in one int64.
    """

    def __init__(self, nbytes: int, granule: int, what: str):
        self.g = granule
        self.what = what
        self.writes = np.zeros(-(-nbytes // granule) + 1, np.int64)
        self.reads = np.zeros(-(-nbytes // granule) + 1, np.int64)

    def conflict(self, before, me):
        x = before ^ me
        other_block = (x >> _BLOCK_AT) != 0
        same_epoch = (x >> _EPOCH_AT) == 0
        other_warp = (x & 0x3E0) != 0
        other_lane = (x & 0x1F) != 0
        same_sync = (x & np.int64((1 << _EPOCH_AT) - (1 << 13))) == 0
        many, many_warp = (before & _MANY) != 0, (before & _MANY_WARP) != 0
        unordered = same_epoch & (many | other_warp | (same_sync & (other_lane | many_warp)))
        return (before != 0) & (other_block | unordered | ((before & _MANY_BLOCKS) != 0))

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
            if values is not None and bad.any():
                bad &= ~self.unchanged(byte, size, lanes, memory, values, len(bad), group)
            readers = self.conflict(self.reads[at], me)
            if readers.any():
                self.report(group, at, readers, lanes, size, "a write after another thread's read")
            self.writes[at] = me
            twice = self.writes[at] != me  # several lanes of this very instruction
            if twice.any() and values is not None:
                self.same_values(group, byte, size, lanes, values, at)
        else:
            seen = self.reads[at]
            x = seen ^ me
            many = np.zeros(len(at), np.int64)
            live = (seen != 0) & ((x >> _EPOCH_AT) == 0)
            many[live & (x & 0x1F != 0)] |= _MANY_WARP
            many[live & (x & 0x3E0 != 0)] |= _MANY
            many |= np.where(live, seen & (_MANY | _MANY_WARP), 0)
            many[(seen != 0) & ((x >> _BLOCK_AT) != 0)] |= _MANY_BLOCKS
            many |= seen & _MANY_BLOCKS
            self.reads[at] = me | many
            now = self.reads[at]
            y = now ^ me
            if ((y & 0x3FF) != 0).any() or ((y >> _BLOCK_AT) != 0).any():  # other lanes of this instruction read it too
                w, x_, z = (y & 0x1F) != 0, (y & 0x3E0) != 0, (y >> _BLOCK_AT) != 0
                for flag, where in ((_MANY_WARP, w), (_MANY, x_), (_MANY_BLOCKS, z)):
                    if where.any():
                        self.reads[at[where]] |= flag
        if bad.any():
            self.report(group, at, bad, lanes, size, "a write after another thread's write" if write else "a read after another thread's write")

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
            if differ.any():
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


class _Machine:
    """One launch: memory, running blocks, counters."""

    def __init__(self, kernel, grid, block, args, dynamic, order, memory, races, count, names):
        self.kernel, self.grid, self.block, self.order = kernel, grid, block, order
        self.races, self.count, self.replicas, self.without = races, count, False, None
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // 32)
        program = kernel.program
        self.shared_bytes = program.shared_bytes + dynamic
        self.shared_stride = -(-self.shared_bytes // 16) * 16 + 128
        self.report = Launch()
        self.fuel = FUEL
        self.arrived: dict[tuple[int, int], int] = defaultdict(int)
        self.special = {f"%ntid.{c}": np.uint32(block[i]) for i, c in enumerate("xyz")}
        self.special |= {f"%nctaid.{c}": np.uint32(grid[i]) for i, c in enumerate("xyz")}
        self.special |= {"%nwarpid": np.uint32(self.warps), "WARP_SZ": np.uint32(32), "%dynamic_smem_size": np.uint32(dynamic)}
        self.special |= {"%cluster_ctarank": np.uint32(0), "%cluster_nctarank": np.uint32(1), "%clusterid.x": np.uint32(0)}
        self._place(args, memory, names)
        self._arguments(args)
        if races:
            self.global_races = _Races(len(self.arena), self.kernel.granules["global"], "global")

    # Memory -------------------------------------------------------------------------------------------------------------

    def _place(self, args, memory, names) -> None:
        """Every buffer into one arena, with guards between."""
        program = self.kernel.program
        self.buffers: list[tuple[str, int, int, np.ndarray | None, int]] = []  # name, address, bytes, array, arena offset
        pieces: list[tuple[int, np.ndarray]] = []
        address, offset = BASE + GUARD, GUARD
        where: dict[int, int] = {}
        parameter_names = list(program.parameters)
        self.sparse = any(isinstance(a, Sparse) for a in args)
        host: list[tuple[int, int, int]] = []
        order = [*zip([*parameter_names, *map(str, range(len(args)))], args), *((f"memory {i}", a) for i, a in enumerate(memory))]
        seen = 0
        for key, a in order:
            if isinstance(a, Sparse):
                label = names[seen] if seen < len(names) else key
                seen += 1
                start = address
                for at, piece in a.pieces.items():
                    if at % 16:
                        raise ValueError("pieces of a sparse array start at multiples of 16 bytes")
                    self.buffers.append((label, start + at, piece.nbytes, piece, offset))
                    pieces.append((offset, piece))
                    offset += -(-piece.nbytes // 256) * 256 + GUARD
                where[id(a)] = start
                address = start + -(-a.nbytes // 256) * 256 + GUARD
            elif isinstance(a, np.ndarray):
                label = names[seen] if seen < len(names) else key
                seen += 1
                host_at = a.ctypes.data
                if not a.flags.c_contiguous:
                    raise ValueError("arrays must be contiguous")
                twin = next((h for h in host if h[0] < host_at + a.nbytes and host_at < h[0] + h[1]), None)
                if twin is not None and (host_at < twin[0] or host_at + a.nbytes > twin[0] + twin[1]):
                    raise NotImplementedError("arrays that overlap in part")
                if twin is not None or a.nbytes == 0:
                    where[id(a)] = address if twin is None else twin[2] + host_at - twin[0]
                    continue
                shift = a.ctypes.data % 16  # a view may start between two aligned addresses
                self.buffers.append((label, address + shift, a.nbytes, a, offset + shift))
                pieces.append((offset + shift, a))
                host.append((host_at, a.nbytes, address + shift))
                where[id(a)] = address + shift
                step = -(-(a.nbytes + shift) // 256) * 256 + GUARD
                address, offset = address + step, offset + step
        total = max((o + s for o, s in program.parameters.values()), default=0)
        for name, data in (*program.constants.items(), ("parameters", bytes(-(-total // 16) * 16))):
            if not data:
                continue
            a = np.frombuffer(data, np.uint8).copy()
            self.buffers.append((f"constant {name}", address, a.nbytes, None, offset))
            pieces.append((offset, a))
            where[name] = address
            step = -(-a.nbytes // 256) * 256 + GUARD
            address, offset = address + step, offset + step
        self.where, self.host = where, host
        self.arena = np.full(-(-offset // 256) * 256 + GUARD, 0xFF, np.uint8)
        ok = np.zeros(len(self.arena), bool)
        for at, a in pieces:
            self.arena[at : at + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
            ok[at : at + a.nbytes] = True
        self.valid = {1: ok}
        for size in (2, 4, 8, 16):
            self.valid[size] = ok.reshape(-1, size).all(1)
        self.views = _views(self.arena)
        self.read_only = None
        for label, *_ in self.buffers:
            size = sum(b[2] for b in self.buffers if b[0] == label)
            self.report.traffic[label] = Traffic(nbytes=size)
        by_offset = sorted(self.buffers, key=lambda b: b[4])
        self.buffer_offsets = np.array([b[4] for b in by_offset], np.int64)
        self.buffer_names = [b[0] for b in by_offset]
        by_address = sorted(self.buffers, key=lambda b: b[1])
        self.addresses = np.array([b[1] for b in by_address], np.int64)
        self.ends = np.array([b[1] + b[2] for b in by_address], np.int64)
        self.deltas = np.array([b[4] - b[1] for b in by_address], np.int64)

    def resolve(self, a):
        """Arena offsets of global addresses; 0, which is a guard, for those outside."""
        if not self.sparse:
            return a - BASE
        i = np.maximum(np.searchsorted(self.addresses, a, "right") - 1, 0)
        return np.where((a >= self.addresses[i]) & (a < self.ends[i]), a + self.deltas[i], 0)

    def nearest(self, a: int) -> str:
        i = max(int(np.searchsorted(self.addresses, a, "right")) - 1, 0)
        if not len(self.addresses):
            return f"address {a:#x}"
        name = sorted(self.buffers, key=lambda b: b[1])[i][0]
        return f"byte {a - int(self.addresses[i])} of {name!r} ({int(self.ends[i] - self.addresses[i])} bytes)"

    def _pointer(self, value: int) -> int:
        for at, size, address in self.host:
            if at <= value < at + max(size, 1):
                return address + value - at
        return value

    def _arguments(self, args) -> None:
        program = self.kernel.program
        if len(args) > len(program.parameters):
            raise PtxError(f"{program.name} takes {len(program.parameters)} arguments, got {len(args)}")
        total = max((o + s for o, s in program.parameters.values()), default=0)
        self.parameters = bytearray(total)
        for (at, size), a in zip(program.parameters.values(), [*args, *[0] * (len(program.parameters) - len(args))]):
            if isinstance(a, (np.ndarray, Sparse)):
                data = struct.pack("<Q", self.where[id(a)])
            elif isinstance(a, (bytes, bytearray)):
                words = bytearray(a)
                for k in range(0, len(words) - 7, 8):
                    words[k : k + 8] = struct.pack("<Q", self._pointer(int.from_bytes(words[k : k + 8], "little")))
                data = bytes(words)
            elif isinstance(a, float):
                data = struct.pack("<f" if size == 4 else "<d", a)
            else:
                value = self._pointer(int(a)) if size == 8 else int(a)
                data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            if len(data) != size:
                raise PtxError(f"an argument of {len(data)} bytes for a parameter of {size}")
            self.parameters[at : at + size] = data
        at = next((b[4] for b in self.buffers if b[0] == "constant parameters"), None)
        if at is not None:
            self.arena[at : at + total] = np.frombuffer(bytes(self.parameters), np.uint8)

    def copy_out(self) -> None:
        for _, _, size, a, at in self.buffers:
            if a is not None and a.flags.writeable:
                a.reshape(-1).view(np.uint8)[:] = self.arena[at : at + size]

    # Counting -----------------------------------------------------------------------------------------------------------

    def count_global(self, group, byte, size, lanes, what) -> None:
        if not len(byte):
            return
        row = (group.row if lanes is None else group.row[lanes]) >> 5
        buffer = np.searchsorted(self.buffer_offsets, byte, "right") - 1
        for i in np.unique(buffer):
            t = self.report.traffic[self.buffer_names[i]]
            mine = buffer == i
            b, r = byte[mine], row[mine]
            if what == "atomic":
                t.atomics += len(b)
                continue
            requests = len(np.unique(r))
            pieces = len(np.unique((r << 40) + b // size)) * size
            sectors = len(np.unique((r << 40) + b // 32)) if size <= 32 else 0
            kind = "load" if what == "load" else "store"
            setattr(t, kind + "_requests", getattr(t, kind + "_requests") + requests)
            setattr(t, kind + "_bytes", getattr(t, kind + "_bytes") + pieces)
            setattr(t, kind + "_sectors", getattr(t, kind + "_sectors") + sectors)

    def count_shared(self, group, a, size, lanes) -> None:
        """32 banks of 4 bytes; 8- and 16-byte accesses go by half and quarter warps."""
        if not len(a):
            return
        lane = group.lane if lanes is None else group.lane[lanes]
        row = (group.row if lanes is None else group.row[lanes]) >> 5
        part = row * 4 + lane // max(8, 128 // max(size, 4))
        words = np.unique((part << 32) + a // 4)
        banks, n = np.unique((words >> 32 << 8) + (words & 31), return_counts=True)
        most = np.zeros(int(part.max()) + 1, np.int64)
        np.maximum.at(most, banks >> 8, n)
        self.report.shared_requests += len(np.unique(part))
        self.report.shared_wavefronts += int(most.sum())

    # Running ------------------------------------------------------------------------------------------------------------

    def run(self, ctas) -> None:
        n = len(ctas) * self.shared_stride
        self.shared_data = np.full(n + 16, 0xFF, np.uint8)
        self.shared_views = _views(self.shared_data)
        if self.races:
            self.shared_races = _Races(len(self.shared_data), self.kernel.granules["shared"], "shared")
        if self.order == "lockstep":
            groups = [_Group(self, range(self.warps), ctas)]
        else:
            groups = [_Group(self, range(w, w + 1), ctas) for w in range(self.warps)]
            if self.order == "warps-reverse":
                groups.reverse()
        with np.errstate(all="ignore"):
            while True:
                for g in groups:
                    g.run()
                if not any(g.alive.any() for g in groups):
                    return
                self.barrier(groups, len(ctas))

    def barrier(self, groups, slots) -> None:
        """Lets those go on whose barrier is complete."""
        slot = np.concatenate([g.slot for g in groups])
        alive = np.concatenate([g.alive for g in groups])
        waits = np.concatenate([g.waiting for g in groups])
        b = np.concatenate([g.bar for g in groups])
        ids = np.concatenate([g.bar_id for g in groups])
        counts = np.concatenate([g.bar_count for g in groups])
        self.report.barriers += 1
        code = self.kernel.translator
        free = np.zeros(len(slot), bool)
        simple = waits[alive].all() and (counts[alive] == 0).all() and len(np.unique(b[alive])) == 1
        if simple:
            free = alive.copy()
        else:
            for s in range(slots):
                mine = alive & (slot == s)
                if not mine.any():
                    continue
                for name in np.unique(ids[mine & waits]):
                    here = mine & waits & (ids == name)
                    want = int(counts[here].max())
                    if want == 0:
                        if here.sum() == mine.sum():
                            if len(np.unique(b[here])) != 1:
                                raise PtxError("threads of one block wait in different bar.sync instructions")
                            free |= here
                    elif here.sum() + self.arrived.get((s, int(name)), 0) >= want:
                        self.arrived.pop((s, int(name)), None)
                        free |= here
            if not free.any():
                raise PtxError("a barrier is never complete: some of the block's threads do not reach it, or reach another one")
        at = 0
        values = np.concatenate([g.bar_value for g in groups])
        for g in groups:
            lanes = free[at : at + g.n]
            at += g.n
            for k in np.unique(g.bar[lanes]):
                some = lanes & (g.bar == k)
                red = code.reductions.get(int(k))
                if red is not None:
                    kind, dst = red
                    total = np.zeros(slots, np.int64)
                    np.add.at(total, slot[free], values[free])
                    every = np.bincount(slot[free], minlength=slots)
                    r = {"popc": total.astype(np.uint32), "or": total > 0, "and": total == every}[kind][g.slot]
                    old = g.R[dst] if kind != "popc" else g.R[dst].view(np.uint32)
                    g.R[dst] = np.where(some, r, old)
                g.release(some, int(k))
