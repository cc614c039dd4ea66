"""What the lanes of a warp do together: shuffles, votes, barriers, tensor cores (sm_75, sm_80)."""

from __future__ import annotations

import numpy as np

from ptx_program import PtxError
from ptx_races import SYNC_AT
from ptx_runtime import every, some

__all__ = ["Warps", "bits"]


def bits(lanes: np.ndarray) -> np.ndarray:
    """Of each warp its lanes as the bits of one number."""
    return np.packbits(lanes, bitorder="little").view(np.uint32)


class Warps:
    """Methods of Group (ptx_lanes.py), whose lanes these are."""

    # Warps --------------------------------------------------------------------------------------------------------------

    def lanes_of_mask(self, mask_reg, mask, what) -> None:
        """The lanes named in the instruction's mask are exactly those that are here."""
        if mask is None and not isinstance(mask_reg, np.ndarray):
            if int(mask_reg) & 0xFFFFFFFF == 0xFFFFFFFF:
                return
            raise PtxError(f"{what}: mask {int(mask_reg):#x}, but all 32 lanes are here (divergence)")
        if mask is None and every(mask_reg == np.uint32(0xFFFFFFFF)):
            return
        here = np.ones(self.n, bool) if mask is None else mask
        have = np.repeat(bits(here), 32)
        bad = here & ((mask_reg & self.exist) != have)
        if some(bad):
            i = int(np.nonzero(bad)[0][0])
            want = mask_reg[i] if isinstance(mask_reg, np.ndarray) else mask_reg
            raise PtxError(f"{what}: mask {int(want):#x}, but lanes {int(have[i]):#x} are here (divergence)")

    def shfl(self, kind, v, b, c, member, mask, site):
        """(values, in range)"""
        self.m.report.sites.add(site)
        if self.m.without == site:
            return v, np.ones(self.n, bool)
        self.lanes_of_mask(member, mask, "shfl.sync")
        key = kind, b.tobytes(), c.tobytes()  # mostly constants, though in registers
        if key not in self.shuffles:
            if len(self.shuffles) == 64:
                self.shuffles.clear()
            self.shuffles[key] = self.sources(kind, b, c)
        src, ok = self.shuffles[key]
        if mask is not None:
            bad = mask & ~mask.take(src)
            if some(bad):
                raise PtxError(f"shfl.sync reads lane {int(src[bad][0] & 31)}, which does not take part")
        return v.take(src), ok

    def sources(self, kind, b, c):
        """Which lanes a shuffle reads, and whether they are in range."""
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
        return np.where(ok, src, lane) + self.row, np.broadcast_to(ok, (self.n,)).copy()

    def ballot(self, p, mask):
        return np.repeat(bits(p if mask is None else p & mask), 32)

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
            step = np.int64(1) << SYNC_AT
            if mask is None:
                self.me = self.me + step
            else:
                self.me = np.where(mask, self.me + step, self.me)

    def active(self, mask):
        return self.ballot(np.ones(self.n, bool), mask)

    # Tensor cores (sm_75, sm_80) ----------------------------------------------------------------------------------------

    def ldmatrix(self, a, offset, count, trans, mask):
        rows, _ = self._matrix_rows(a, offset, count, mask, False)
        data = self.m.shared_views[2].reshape(-1, 8)[rows]  # [n, 8]
        tiles = data.reshape(-1, 32, 8)[:, : 8 * count].reshape(-1, count, 8, 8).astype(np.uint32)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        t = np.arange(32)
        return [(tiles[:, j, t >> 2, 2 * (t & 3)] | tiles[:, j, t >> 2, 2 * (t & 3) + 1] << np.uint32(16)).reshape(-1).copy() for j in range(count)]

    def stmatrix(self, a, offset, values, trans, mask):
        count = len(values)
        rows, takes = self._matrix_rows(a, offset, count, mask, True)
        t = np.arange(32)
        out = np.zeros((self.n // 32, 4, 8, 8), np.uint16)
        for j, v in enumerate(values):
            v = v.reshape(-1, 32)
            out[:, j, t >> 2, 2 * (t & 3)], out[:, j, t >> 2, 2 * (t & 3) + 1] = v & np.uint32(0xFFFF), v >> np.uint32(16)
        if trans:
            out = out.transpose(0, 1, 3, 2)
        data = out.reshape(-1, 32, 8).reshape(-1, 8)
        self.m.shared_views[2].reshape(-1, 8)[rows[takes]] = data[takes]

    def _matrix_rows(self, a, offset, count, mask, write):
        takes = self.lane < 8 * count
        if mask is not None:
            whole = mask.reshape(-1, 32)
            if (whole.any(1) != whole.all(1)).any():
                raise PtxError("a matrix is loaded or stored by a part of a warp: .aligned takes all of it")
            takes = takes & mask
        addr = (a.astype(np.int64) if a.dtype.itemsize == 4 else a.view(np.int64)) + offset
        bad = takes & ((addr < 0) | (addr > self.m.shared_bytes - 16) | (addr % 16 != 0))
        if bad.any():
            self.fault("matrix row outside shared memory or misaligned", addr, None, bad)
        byte = np.where(takes, addr, 0) + self.shared_at
        if self.m.races:
            lanes = takes.nonzero()[0]
            self.m.shared_races.check(self, byte[lanes], 16, lanes, write, self.m.shared_views, None)
        return byte // 16, takes

    def mma(self, shape, a_type, b_type, A, B, C, mask):
        """D of D = A @ B + C; float32 accumulators. A, B: lists of u32 vectors; C: of float32."""
        if mask is not None:
            raise NotImplementedError("mma in part of a warp")
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
