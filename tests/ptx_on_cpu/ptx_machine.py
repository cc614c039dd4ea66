"""A PTX emulator in NumPy, for tests: runs what Triton or nvcc compiled, without a GPU. Never a measure of a GPU's speed.

Many blocks run side by side, and lanes with the same program counter step together: each basic block becomes one Python
function on vectors (`ptx_code`). Three orders: `lockstep` steps whole blocks; `warps` and `warps-reverse` let one warp run until
it waits or ends, so that a missing barrier gives a wrong result. `races=True` also names unordered accesses to one word (in any
order of execution, write after read included).

Every global access must lie in an argument's array, every shared access in the block's shared memory; both are aligned. Shared
and local memory and registers start as 0xFF (NaN, -1). Barriers must be reached by all of a block's threads.

Blocks that run side by side may wait for each other, with nanosleep in the loop (`ptx_meetings`): four times as many lanes run then.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice, product

import numpy as np

from ptx_code import Translator
from ptx_lanes import LOG2, Group
from ptx_meetings import BlockRaces
from ptx_program import WIDTH, Module, Program, PtxError
from ptx_races import Races, views
from ptx_report import Launch, Site, Sparse, Traffic
from ptx_runtime import every

__all__ = ["ORDERS", "Kernel", "Launch", "PtxError", "Site", "Sparse", "Traffic"]

ORDERS = ("lockstep", "warps", "warps-reverse")
BASE = 0x7F00_0000_0000  # of global memory
GUARD = 512  # bytes between two buffers; the buffers themselves are aligned like CUDA's allocator does
LANES = 16384  # that step together at most
FUEL = 3_000_000  # basic blocks; a kernel that spins ends here


def distinct(a: np.ndarray) -> int:
    """How many different numbers are in a sorted vector."""
    return 1 + int(np.count_nonzero(a[1:] != a[:-1]))


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
            without: leave out this barrier, warp barrier, wait or shuffle, this release, this acquire (it sees a wait's end), or this
                access's predicate: a mutant.
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
        machine = Machine(self, grid, block, args, shared, order, list(memory), races, count, names)
        machine.replicas, machine.without = replicas, without
        which = iter(blocks) if blocks is not None else ((x, y, z) for z, y, x in product(*map(range, reversed(grid))))
        step = max(1, LANES * (4 if self.program.sleeps else 1) // (-(-threads // 32) * 32))
        some = list(islice(which, step))
        while some:
            later = list(islice(which, step))
            machine.more = bool(later)
            machine.run(some)
            some = later
        machine.copy_out()
        return machine.report


class Machine:
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
        self.moves = 0  # stores to global memory
        self.clocks = None
        self.arrived: dict[tuple[int, int], int] = defaultdict(int)
        self.special = {f"%ntid.{c}": np.uint32(block[i]) for i, c in enumerate("xyz")}
        self.special |= {f"%nctaid.{c}": np.uint32(grid[i]) for i, c in enumerate("xyz")}
        self.special |= {"%nwarpid": np.uint32(self.warps), "WARP_SZ": np.uint32(32), "%dynamic_smem_size": np.uint32(dynamic)}
        self.special |= {"%cluster_ctarank": np.uint32(0), "%cluster_nctarank": np.uint32(1), "%clusterid.x": np.uint32(0)}
        self._place(args, memory, names)
        self._arguments(args)
        if races:
            self.global_races = (BlockRaces if program.sleeps else Races)(len(self.arena), self.kernel.granules["global"], "global")

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
            ok = self.valid[size] = ok[::2] & ok[1::2]
        self.views = views(self.arena)
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
        row = (group.row if lanes is None else group.row.take(lanes)) >> 5
        buffer = np.searchsorted(self.buffer_offsets, byte, "right") - 1
        found = buffer[:1] if every(buffer == buffer[0]) else np.unique(buffer)
        for i in found.tolist():
            t = self.report.traffic[self.buffer_names[i]]
            b, r = (byte, row) if len(found) == 1 else (byte[buffer == i], row[buffer == i])
            if what == "atomic":
                t.atomics += len(b)
                continue
            places = np.sort((r << 40) + b)
            requests, pieces = distinct(r), distinct(places >> LOG2[size]) * size
            sectors = distinct(places >> 5) if size <= 32 else 0
            kind = "load" if what == "load" else "store"
            setattr(t, kind + "_requests", getattr(t, kind + "_requests") + requests)
            setattr(t, kind + "_bytes", getattr(t, kind + "_bytes") + pieces)
            setattr(t, kind + "_sectors", getattr(t, kind + "_sectors") + sectors)

    def count_shared(self, group, a, size, lanes) -> None:
        """32 banks of 4 bytes; 8- and 16-byte accesses go by half and quarter warps."""
        if not len(a):
            return
        lane = group.lane if lanes is None else group.lane.take(lanes)
        row = (group.row if lanes is None else group.row.take(lanes)) >> 5
        part = row * 4 + lane // max(8, 128 // max(size, 4))
        words = np.sort((part << 32) + (a >> 2))
        words = words[np.append(True, words[1:] != words[:-1])]
        most = np.bincount((words >> 32 << 5) + (words & 31), minlength=int(part[-1] + 1) * 32).reshape(-1, 32).max(1)
        self.report.shared_requests += int(np.count_nonzero(most))
        self.report.shared_wavefronts += int(most.sum())

    # Running ------------------------------------------------------------------------------------------------------------

    def numbers(self, ctas) -> np.ndarray:
        """Of blocks, from 1: they have 17 bits in a record of races."""
        cta = np.array(ctas, np.int64).reshape(-1, 3)
        return (cta[:, 0] + self.grid[0] * (cta[:, 1] + self.grid[1] * cta[:, 2])) % (1 << 16) + 1

    def run(self, ctas) -> None:
        n = len(ctas) * self.shared_stride
        self.shared_data = np.full(n + 16, 0xFF, np.uint8)
        self.shared_views = views(self.shared_data)
        if self.races:
            self.shared_races = Races(len(self.shared_data), self.kernel.granules["shared"], "shared")
            if self.kernel.program.sleeps:
                self.clocks = self.global_races.enter(self.numbers(ctas))
        if self.order == "lockstep":
            groups = [Group(self, range(self.warps), ctas)]
        else:
            groups = [Group(self, range(w, w + 1), ctas) for w in range(self.warps)]
            if self.order == "warps-reverse":
                groups.reverse()
        before, quiet = None, 0
        with np.errstate(all="ignore"):
            while True:
                for g in groups:
                    g.run()
                if not any(g.alive.any() for g in groups):
                    return
                asleep = any(g.sleeps for g in groups)
                freed = self.barrier(groups, len(ctas), asleep)
                if asleep:  # twice: those who see what they wait for may only wait for the next
                    now = self.moves, [(int(g.alive.sum()), g.pc[g.asleep].tobytes()) for g in groups]
                    quiet = quiet + 1 if now == before and not freed else 0
                    before = now
                    if quiet == 2:
                        self.stuck(ctas)
                    for g in groups:
                        g.wake()

    def stuck(self, ctas) -> None:
        message = f"{self.kernel.program.name}: blocks wait for each other for ever: a value they wait for never comes"
        if self.more:
            message += f" (or from later blocks: no more than {len(ctas)} of {self.threads} threads run side by side here)"
        raise PtxError(message)

    def barrier(self, groups, slots, asleep) -> bool:
        """Lets those go on whose barrier is complete. While somebody sleeps the others of a block may still come."""
        slot = np.concatenate([g.slot for g in groups])
        alive = np.concatenate([g.alive for g in groups])
        waits = np.concatenate([g.waiting & ~g.asleep if g.sleeps else g.waiting for g in groups])
        if asleep and not (alive & waits).any():
            return False
        b = np.concatenate([g.bar for g in groups])
        ids = np.concatenate([g.bar_id for g in groups])
        counts = np.concatenate([g.bar_count for g in groups])
        code = self.kernel.translator
        free = np.zeros(len(slot), bool)
        simple = waits[alive].all() and (counts[alive] == 0).all() and len(np.unique(b[alive])) == 1
        if simple:
            free = alive.copy()
        else:
            which = range(slots)
            if asleep:  # mostly a few blocks wait for the others: those that are whole, and whose barriers are all of one name
                whole = np.bincount(slot[alive & waits & (counts == 0)], minlength=slots) == np.bincount(slot[alive], minlength=slots)
                which = np.unique(slot[alive & waits & (whole[slot] | (counts != 0))])
            for s in which:
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
            if asleep and not free.any():
                return False
            if not free.any():
                raise PtxError("a barrier is never complete: some of the block's threads do not reach it, or reach another one")
        self.report.barriers += 1
        if self.clocks is not None:
            self.clocks.barrier(np.bincount(slot[free], minlength=slots) == np.bincount(slot[alive], minlength=slots))
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
        return True
