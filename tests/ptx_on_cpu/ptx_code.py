"""Basic blocks of PTX to Python functions on NumPy vectors, one element a lane.

A block's function takes (group, registers, mask). Without a mask all lanes step together and results replace registers; with one
they are merged. A register is a vector of its declared width, in whatever dtype last wrote it; arithmetic is NumPy's in that type.
fma rounds twice (in double, then in float), `.approx` functions are exact: tolerances, never bit equality with a GPU.
"""

from __future__ import annotations

import re

import numpy as np

from ptx_program import WIDTH, Block, Instruction, Program, is_warp_sync

__all__ = ["Translator"]

_NP = {"u": "u", "s": "i", "b": "u", "f": "f"}
_ATOMS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")


# Functions of the generated code ----------------------------------------------------------------------------------------


def from_bf16(h):
    return (h.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(f, toward_zero=False):
    x = np.ascontiguousarray(f, np.float32).view(np.uint32)
    if toward_zero:
        r = x >> np.uint32(16)
    else:
        r = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(f), np.uint32(0x7FFF), r).astype(np.uint16)


def flush(x):
    """Subnormal numbers to zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def saturate(x):
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def rounded(exact, kind, dtype):
    """A float64 result in `dtype`, rounded to nearest, down, up or towards zero."""
    r = exact.astype(dtype)
    if kind in ("rn", ""):
        return r
    back = r.astype(np.float64)
    down, up = np.nextafter(r, dtype(-np.inf)), np.nextafter(r, dtype(np.inf))
    if kind == "rm":
        return np.where(back > exact, down, r)
    if kind == "rp":
        return np.where(back < exact, up, r)
    return np.where(np.abs(back) > np.abs(exact), np.where(exact > 0, down, up), r)


def fma(a, b, c, kind="rn"):
    if a.dtype == np.float64:
        return a * b + c
    exact = np.add(np.multiply(a, b, dtype=np.float64), c, dtype=np.float64)
    return exact.astype(np.float32) if kind == "rn" else rounded(exact, kind, np.float32)


def add(a, b, kind):
    return a + b if kind in ("rn", "") or a.dtype == np.float64 else rounded(np.add(a, b, dtype=np.float64), kind, np.float32)


def mul(a, b, kind):
    return a * b if kind in ("rn", "") or a.dtype == np.float64 else rounded(np.multiply(a, b, dtype=np.float64), kind, np.float32)


def shift_left(a, n):
    bits = a.dtype.itemsize * 8
    k = np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), a << k)


def shift_right(a, n):
    bits = a.dtype.itemsize * 8
    k = np.minimum(n, bits - 1).astype(a.dtype)
    return a >> k if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> k)


def divide(a, b):
    """Towards zero; x / 0 is all ones, as on a GPU."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // np.where(b == 0, b.dtype.type(1), b))
    safe = np.where(b == 0, b.dtype.type(1), b)
    q = a // safe
    q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), q)


def remainder(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, np.where(b == 0, a, a - divide(a, safe) * safe))


def high(a, b):
    """Upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}").type
        return ((a.astype(wide) * np.asarray(b).astype(wide)) >> wide(bits)).astype(a.dtype)
    signed = a.dtype.kind == "i"
    x, y = a.view(np.uint64), np.broadcast_to(np.asarray(b), a.shape).astype(a.dtype).view(np.uint64)
    m32 = np.uint64(0xFFFFFFFF)
    s = np.uint64(32)
    xl, xh, yl, yh = x & m32, x >> s, y & m32, y >> s
    mid = (xl * yl >> s) + (xh * yl & m32) + (xl * yh & m32)
    r = xh * yh + (xh * yl >> s) + (xl * yh >> s) + (mid >> s)
    if signed:
        r = r - np.where(x >> np.uint64(63) != 0, y, np.uint64(0)) - np.where(y >> np.uint64(63) != 0, x, np.uint64(0))
    return r.view(a.dtype)


def extract(a, at, n):
    """bfe"""
    bits = a.dtype.itemsize * 8
    at, n = np.minimum(at & np.uint32(255), bits).astype(np.int64), np.minimum(n & np.uint32(255), bits).astype(np.int64)
    x = [int(v) & ((1 << bits) - 1) for v in a]
    at, n = np.broadcast_to(at, a.shape), np.broadcast_to(n, a.shape)
    out = []
    for v, p, k in zip(x, at.tolist(), n.tolist()):
        r = (v >> p) & ((1 << k) - 1)
        if a.dtype.kind == "i" and k:
            top = v >> min(p + k - 1, bits - 1) & 1
            if top:
                r |= ((1 << bits) - 1) & ~((1 << k) - 1)
        out.append(r)
    return np.array(out, f"u{a.dtype.itemsize}").view(a.dtype)


def insert(a, b, at, n):
    """bfi: the low n bits of a into b"""
    bits = b.dtype.itemsize * 8
    at, n = np.minimum(at & np.uint32(255), bits).astype(np.uint64), np.minimum(n & np.uint32(255), bits).astype(np.uint64)
    ones = np.where(n >= 64, np.uint64(2**64 - 1), (np.uint64(1) << np.minimum(n, np.uint64(63))) - np.uint64(1))
    shift = np.minimum(at, np.uint64(63))
    m = np.where(at >= bits, np.uint64(0), ones << shift)
    return ((b.astype(np.uint64) & ~m) | ((a.astype(np.uint64) << shift) & m)).astype(b.dtype)


def permute(a, b, sel):
    """prmt, default mode"""
    whole = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    sel = np.broadcast_to(np.asarray(sel), np.broadcast_shapes(np.shape(a), np.shape(b)))
    out = np.zeros(whole.shape, np.uint64)
    for k in range(4):
        s = (sel.astype(np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
        byte = (whole >> ((s & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(s & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out |= byte << np.uint64(8 * k)
    return out.astype(np.uint32)


def logic3(a, b, c, table):
    r = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for k in range(8):
        if table >> k & 1:
            r |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return r


def funnel(lo, hi, n, left, clamp):
    n = np.asarray(n).astype(np.uint64)
    n = np.minimum(n, np.uint64(32)) if clamp else n & np.uint64(31)
    whole = lo.astype(np.uint64) | hi.astype(np.uint64) << np.uint64(32)
    r = (whole << n) >> np.uint64(32) if left else whole >> n
    return r.astype(np.uint32)


def bits_set(a):
    return np.bitwise_count(a).astype(np.uint32)


def leading_zeros(a):
    bits = a.dtype.itemsize * 8
    return np.array([bits - int(v).bit_length() for v in a.view(f"u{a.dtype.itemsize}")], np.uint32)


def reverse_bits(a):
    bits = a.dtype.itemsize * 8
    return np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in a], a.dtype)


def find_top(a, shift_amount):
    bits = a.dtype.itemsize * 8
    x = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
    n = np.array([int(v).bit_length() - 1 for v in x], np.int64)
    r = np.where(n < 0, 0xFFFFFFFF, bits - 1 - n if shift_amount else n)
    return r.astype(np.uint32)


def to_integer(a, kind, dtype):
    """Float to integer: rounded, clamped, NaN is 0."""
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[kind](a.astype(np.float64))
    i = np.iinfo(dtype)
    inside = np.where((x > i.min) & (x < float(i.max)), x, 0.0).astype(dtype)
    return np.where(np.isnan(x), dtype(0), np.where(x >= float(i.max), i.max, np.where(x <= i.min, i.min, inside))).astype(dtype)


def minimum_nan(a, b):
    return np.minimum(a, b)


_RUNTIME = {
    f.__name__: f
    for f in (
        from_bf16, to_bf16, flush, saturate, rounded, fma, add, mul, shift_left, shift_right, divide, remainder, high, extract, insert,
        permute, logic3, funnel, bits_set, leading_zeros, reverse_bits, find_top, to_integer,
    )
} | {"np": np, "where": np.where}  # fmt: skip


class Translator:
    """The program's blocks as functions, made when first needed."""

    def __init__(self, program: Program):
        self.program = program
        self.n = len(program.blocks)
        own = [len(b.body) + (b.end is not None) for b in program.blocks]
        self.sizes = [own, list(own)]
        """Instructions of a block under a mask, and of what runs without one: it goes on until control may turn."""
        self.last = list(range(self.n))
        for k in reversed(range(self.n - 1)):
            if program.blocks[k].end is None:
                self.last[k] = self.last[k + 1]
                self.sizes[1][k] += self.sizes[1][k + 1]
        self.syncs = [bool(b.body) and is_warp_sync(b.body[0]) for b in program.blocks]
        self.reductions: dict[int, tuple[str, int]] = {}
        """Barriers with a result: block index -> (kind, register)."""
        self._made: dict[tuple[int, bool], object] = {}
        for k, b in enumerate(program.blocks):
            if b.end is not None and b.end.op[0] in ("bar", "barrier") and "red" in b.end.op:
                self.reductions[k] = (next(x for x in b.end.op if x in ("popc", "or", "and")), program.registers[b.end.operands[0]])

    def function(self, b: int, masked: bool):
        f = self._made.get((b, masked))
        if f is None:
            f = self._made[b, masked] = _Emitter(self.program, b, b if masked else self.last[b], masked).function()
        return f


class _Emitter:
    def __init__(self, program: Program, first: int, index: int, masked: bool):
        self.p, self.first, self.index, self.masked = program, first, index, masked
        self.block: Block = program.blocks[index]
        self.lines: list[str] = []
        self.names = dict(_RUNTIME)
        self.views: dict[int, dict[str, str]] = {}
        self.fresh = 0

    # Pieces -------------------------------------------------------------------------------------------------------------

    def function(self):
        for at in range(self.first, self.index + 1):
            for k, i in enumerate(self.p.blocks[at].body):
                self.site = at, k
                self.translate(i)
        self.finish(self.block.end)
        text = "def f(g, R, m):\n" + "".join(f"    {line}\n" for line in self.lines)
        exec(compile(text, f"<block {self.first} of {self.p.name}>", "exec"), self.names)
        return self.names["f"]

    def say(self, line: str) -> None:
        self.lines.append(line)

    def temp(self, expression: str) -> str:
        self.fresh += 1
        name = f"t{self.fresh}"
        self.say(f"{name} = {expression}")
        return name

    def keep(self, value) -> str:
        self.fresh += 1
        name = f"K{self.fresh}"
        self.names[name] = value
        return name

    def translate(self, i: Instruction) -> None:
        method = getattr(self, "i_" + i.op[0], None)
        if method is None:
            raise NotImplementedError(i.text)
        try:
            method(i)
        except (KeyError, IndexError, StopIteration) as e:
            raise NotImplementedError(f"{i.text} ({type(e).__name__}: {e})") from e
        except NotImplementedError as e:
            raise NotImplementedError(f"{i.text} {e}") from None

    def execute(self, i: Instruction) -> str | None:
        """Name of the mask of lanes that execute, or None for all."""
        base = "m" if self.masked else None
        if not i.guard:
            return base
        p = self.reg(i.guard, "pred")
        if i.negated:
            p = f"~{p}"
        return self.temp(f"{base} & {p}" if base else p)

    def guarded(self, ex: str | None) -> str | None:
        """The mask of an access to memory: `ex`, unless a mutant lacks the predicate."""
        return ex if ex in ("m", None) else f"g.guarded({ex}, m, {self.site})"

    # Operands -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def tag(t: str) -> str:
        """NumPy dtype of a PTX type."""
        if t in ("pred", "bf16"):
            return t
        if t in ("f16x2", "bf16x2", "tf32"):
            return "u4"
        if t not in WIDTH:
            raise NotImplementedError(f"type .{t}")
        return f"{_NP[t[0]]}{WIDTH[t] // 8}"

    def is_register(self, o: str) -> bool:
        return o in self.p.registers

    def reg(self, name: str, tag: str) -> str:
        """A register in a dtype of its width."""
        if name.startswith("!"):
            return f"(~{self.reg(name[1:], tag)})"
        k = self.p.registers[name]
        views = self.views.setdefault(k, {})
        if tag not in views:
            if tag == "pred":
                views[tag] = self.temp(f"R[{k}]")
            elif tag == "bf16":
                views[tag] = self.temp(f"from_bf16({self.reg(name, 'u2')})")
            else:
                if int(tag[1:]) * 8 != self.p.widths[k]:
                    raise NotImplementedError(f"{name} of {self.p.widths[k]} bits read as {tag}")
                first = next((v for t, v in views.items() if t != "bf16"), None)
                views[tag] = self.temp(f"{first or f'R[{k}]'}.view({tag!r})")
        return views[tag]

    def constant(self, o: str, tag: str) -> np.generic:
        if tag == "bf16":
            return self._bf16(o)
        if tag == "pred":
            return np.bool_(int(o, 0))
        dtype = np.dtype(tag)
        low = o.lower()
        if low.startswith("0f") and re.fullmatch(r"0f[0-9a-f]{8}", low):
            raw = np.uint32(int(o[2:], 16))
            return raw.view(dtype) if dtype.itemsize == 4 else raw.view(np.float32).astype(dtype)
        if low.startswith("0d") and re.fullmatch(r"0d[0-9a-f]{16}", low):
            raw = np.uint64(int(o[2:], 16))
            return raw.view(dtype) if dtype.itemsize == 8 else raw.view(np.float64).astype(dtype)
        if dtype.kind == "f" and re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", low):
            return dtype.type(float(o))
        v = int(o.rstrip("U"), 0)
        if dtype.kind == "f":  # bits
            return np.dtype(f"u{dtype.itemsize}").type(v & (1 << 8 * dtype.itemsize) - 1).view(dtype)
        raw = np.dtype(f"u{dtype.itemsize}").type(v & (1 << 8 * dtype.itemsize) - 1)
        return raw.view(dtype)

    @staticmethod
    def _bf16(o: str) -> np.float32:
        return (np.uint32(int(o, 0) & 0xFFFF) << np.uint32(16)).view(np.float32)

    def symbol(self, o: str) -> int | None:
        for table in (self.p.shared, self.p.local):
            if o in table:
                return table[o]
        return None

    def src(self, o: str, t: str, vector: bool = False) -> str:
        """An expression of the operand in type t: a vector, or a scalar constant unless `vector`."""
        tag = self.tag(t)
        if self.is_register(o) or o.startswith("!"):
            name = o.lstrip("!")
            width = self.p.widths[self.p.registers[name]]
            if tag not in ("pred", "bf16") and width != int(tag[1:]) * 8:
                if width < int(tag[1:]) * 8 or tag[0] == "f":
                    raise NotImplementedError(f"{o} of {width} bits as .{t}")
                return self.temp(f"{self.reg(name, f'u{width // 8}')}.astype('u{tag[1:]}').view({tag!r})")
            return self.reg(o, tag)
        special = self.special(o, tag)
        if special is not None:
            return special
        at = self.symbol(o)
        if at is not None:
            value = np.dtype(tag).type(at)
        elif o in self.p.parameters:  # its address
            return self.temp(f"g.const(np.{np.dtype(tag).name}(g.m.where['parameters'] + {self.p.parameters[o][0]}))")
        elif o in self.p.constants:
            return self.temp(f"g.const(np.{np.dtype(tag).name}(g.m.where[{o!r}]))")
        else:
            value = self.constant(o, tag)
        k = self.keep(value)
        return f"g.const({k})" if vector else k

    def special(self, o: str, tag: str) -> str | None:
        if re.match(r"%(tid|ctaid)\.[xyz]$", o) or o in ("%laneid", "%warpid") or o.startswith("%lanemask_"):
            e = f"g.special[{o!r}]"
        elif re.match(r"%(ntid|nctaid)\.[xyz]$", o) or o in ("%nwarpid", "WARP_SZ", "%dynamic_smem_size", "%cluster_ctarank", "%cluster_nctarank", "%clusterid.x"):
            e = f"g.const(g.m.special[{o!r}])"
        elif re.match(r"%(clock|clock64|globaltimer)", o):
            e = "g.const(np.uint32(0))"
        elif o.startswith("%") and not self.is_register(o):
            raise NotImplementedError(f"special register {o}")
        else:
            return None
        if tag[1:] == "4":
            return self.temp(e if tag == "u4" else f"{e}.view({tag!r})")
        return self.temp(f"{e}.astype({tag!r})")

    def put(self, dst: str, expression: str, tag: str, ex: str | None) -> None:
        """Writes lanes `ex` of a register; narrower values are extended by the sign of their type."""
        if dst == "_":
            return
        k = self.p.registers[dst]
        width = self.p.widths[k]
        if tag == "bf16":
            expression, tag = f"to_bf16({expression})", "u2"
        if tag == "pred":
            if width != 1:
                raise NotImplementedError("a predicate into a wide register")
        elif int(tag[1:]) * 8 < width:
            if tag[0] == "f":
                expression, tag = f"({expression}).view('u{tag[1:]}')", f"u{tag[1:]}"
            wide = f"{tag[0]}{width // 8}"
            expression, tag = f"({expression}).astype({wide!r})", wide
        elif int(tag[1:]) * 8 != width:
            raise NotImplementedError(f"{tag} into {width} bits")
        name = self.temp(expression)
        if ex is not None:
            old = self.reg(dst, tag)
            name = self.temp(f"where({ex}, {name}, {old})")
        self.say(f"R[{k}] = {name}")
        self.views[k] = {tag: name}

    def vector(self, o: str) -> list[str]:
        return [x.strip() for x in o.strip("{} ").split(",")] if o.startswith("{") else [o]

    def address(self, o: str) -> tuple[str, int]:
        """(vector expression, constant offset)"""
        m = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", o)
        if not m:
            raise NotImplementedError(f"address {o}")
        offset = int(m[2] or "0", 0)
        if self.is_register(m[1]):
            width = self.p.widths[self.p.registers[m[1]]]
            return self.reg(m[1], f"u{width // 8}"), offset
        at = self.symbol(m[1])
        if at is not None:
            return f"g.const({self.keep(np.int64(at))})", offset
        if m[1] in self.p.constants:
            return self.temp(f"g.const(np.int64(g.m.where[{m[1]!r}]))"), offset
        return f"g.const({self.keep(np.int64(int(m[1], 0)))})", offset

    # Moving -------------------------------------------------------------------------------------------------------------

    @staticmethod
    def space(op: list[str]) -> str:
        for s in ("global", "shared", "local", "const", "param"):
            if s in op:
                return s
        return "generic"

    def i_mov(self, i: Instruction) -> None:
        ex = self.execute(i)
        t = i.type
        d, s = self.vector(i.operands[0]), self.vector(i.operands[1])
        if t == "pred":
            return self.put(d[0], self.src(s[0], "pred", True), "pred", ex)
        bits = WIDTH[t]
        if len(d) > 1:
            n = bits // len(d)
            v = self.src(s[0], f"b{bits}", True)
            for k, r in enumerate(d):
                if r != "_":
                    self.put(r, f"({v} >> np.uint{bits}({k * n})).astype('u{n // 8}')", f"u{n // 8}", ex)
        elif len(s) > 1:
            n = bits // len(s)
            parts = [f"({self.src(r, f'b{n}', True)}.astype('u{bits // 8}') << np.uint{bits}({k * n}))" for k, r in enumerate(s)]
            self.put(d[0], " | ".join(parts), f"u{bits // 8}", ex)
        else:
            tag = self.tag(t)
            if ex is None and self.is_register(s[0]) and self.views.get(self.p.registers[s[0]]):
                tag = next((x for x in self.views[self.p.registers[s[0]]] if x != "bf16"), tag)
                if tag != "pred" and int(tag[1:]) * 8 == bits:
                    return self.put(d[0], self.reg(s[0], tag), tag, None)
                tag = self.tag(t)
            self.put(d[0], self.src(s[0], t, True), tag, ex)

    def i_ld(self, i: Instruction) -> None:
        ex = self.execute(i)
        t = i.type
        size = WIDTH[t] // 8
        space = self.space(i.op)
        d = self.vector(i.operands[0])
        operands = [o for o in i.operands[1:]]
        if space == "param":
            m = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:\+\s*(-?\w+))?\s*\]", operands[0])
            if m and m[1] in self.p.parameters:
                at = self.p.parameters[m[1]][0] + int(m[2] or "0", 0)
                for k, r in enumerate(d):
                    e = f"g.const(np.frombuffer(g.m.parameters, {self.tag('u' + t[1:] if t[0] == 'b' else t)!r}, 1, {at + k * size})[0])"
                    self.put(r, e, self.tag("u" + t[1:] if t[0] == "b" else t), ex)
                return
            space = "const" if m and self.is_register(m[1]) else "local"
        a, offset = self.address(operands[0])
        space = space if space != "const" else "const"
        olds = "()" if ex is None else "(" + "".join(self._old(r, size) + ", " for r in d) + ")"
        got = self.temp(f"g.ld({a}, {offset}, {size}, {len(d)}, {space!r}, {self.guarded(ex)}, {olds})")
        narrow = f"{_NP[t[0]]}{size}"
        for k, r in enumerate(d):
            if r == "_":
                continue
            e = f"{got}[{k}]"
            width = self.p.widths[self.p.registers[r]]
            if width == size * 8:
                name = self.temp(e)
                self.say(f"R[{self.p.registers[r]}] = {name}")
                self.views[self.p.registers[r]] = {f"u{size}": name}
            else:
                self.put(r, e if narrow[0] == "u" else f"{e}.view({narrow!r})", narrow, ex)

    def _old(self, r: str, size: int) -> str:
        if r == "_" or self.p.widths[self.p.registers[r]] != size * 8:
            return f"g.poison[{size * 8}]"
        return self.reg(r, f"u{size}")

    i_ldu = i_ld

    def i_st(self, i: Instruction) -> None:
        ex = self.execute(i)
        t = i.type
        size = WIDTH[t] // 8
        space = self.space(i.op)
        if space == "param":
            space = "local"
        a, offset = self.address(i.operands[0])
        values = []
        for r in self.vector(i.operands[1]):
            if self.is_register(r) and self.p.widths[self.p.registers[r]] > size * 8:
                w = self.p.widths[self.p.registers[r]] // 8
                values.append(self.temp(f"{self.reg(r, f'u{w}')}.astype('u{size}')"))
            else:
                values.append(self.src(r, f"b{size * 8}", True))
        self.say(f"g.st({a}, {offset}, {size}, [{', '.join(values)}], {space!r}, {self.guarded(ex)})")

    def i_atom(self, i: Instruction, returns: bool = True) -> None:
        ex = self.execute(i)
        t = i.type
        kind = next(x for x in i.op if x in _ATOMS)
        if t.endswith("x2") or "noftz" in i.op and t not in ("f16", "bf16"):
            raise NotImplementedError("packed atomics")
        operands = i.operands if returns else ["_", *i.operands]
        a, offset = self.address(operands[1])
        size = WIDTH[t] // 8
        tag = self.tag(t)
        if tag[0] == "f" and size == 2:
            tag = "f2"
        values = ", ".join(self.src(o, t, True) for o in operands[2:])
        old = self._old(operands[0], size)
        got = f"g.atom({a}, {offset}, {size}, {kind!r}, {tag!r}, [{values}], {self.space(i.op)!r}, {ex}, {old})"
        if operands[0] == "_":
            self.say(got)
        else:
            self.put(operands[0], got, f"u{size}", None)

    def i_red(self, i: Instruction) -> None:
        if "async" in i.op:
            raise NotImplementedError("red.async")
        self.i_atom(i, False)

    def i_cp(self, i: Instruction) -> None:
        if i.op[1] != "async" or "bulk" in i.op:
            raise NotImplementedError("bulk copies")
        if "commit_group" in i.op:
            return self.say("g.commit()")
        if "wait_group" in i.op:
            return self.say(f"g.wait_group({int(i.operands[0], 0)}, False, {self.site})")
        if "wait_all" in i.op:
            return self.say(f"g.wait_group(0, True, {self.site})")
        ex = self.execute(i)
        dst, o1 = self.address(i.operands[0])
        src, o2 = self.address(i.operands[1])
        size = int(i.operands[2], 0)
        n = "None"
        if len(i.operands) > 3:
            n = self.src(i.operands[3], "b32", True)
        self.say(f"g.cp_async({dst}, {o1}, {src}, {o2}, {size}, {n}, {ex})")

    def i_cvta(self, i: Instruction) -> None:
        ex = self.execute(i)
        space = self.space(i.op)
        t = "u64" if i.type == "u64" else "u32"
        window = {"shared": "0x010000000000", "local": "0x020000000000"}.get(space, "0")
        v = self.src(i.operands[1], t, True)
        if window != "0":
            v = f"{v} {'-' if 'to' in i.op else '+'} np.uint64({window})"
        self.put(i.operands[0], v, self.tag(t), ex)

    def _hint(self, i: Instruction) -> None:
        pass

    i_prefetch = i_prefetchu = i_membar = i_fence = i_griddepcontrol = i_nanosleep = i_applypriority = i_discard = _hint

    def i_createpolicy(self, i: Instruction) -> None:
        self.put(i.operands[0], f"g.const({self.keep(np.uint64(0))})", "u8", self.execute(i))

    # Arithmetic ---------------------------------------------------------------------------------------------------------

    def calc(self, i: Instruction, form, sources: int, result: str | None = None, t: str | None = None) -> None:
        """dst = form(a, b, ...) in the instruction's type, with .ftz and .sat; packed types half by half."""
        ex = self.execute(i)
        t = t or i.type
        operands = i.operands[1 : 1 + sources]
        if t in ("f16x2", "bf16x2"):
            xs = []
            for o in operands:
                v = self.src(o, "b32", True)
                xs.append(self.temp(f"{v}.view('f2')" if t == "f16x2" else f"from_bf16({v}.view('u2'))"))
            e = form(*xs)
            e = f"({e}).astype('f2').view('u4')" if t == "f16x2" else f"to_bf16({e}).view('u4')"
            return self.put(i.operands[0], e, "u4", ex)
        xs = [self.src(o, t, k == 0 and not self.is_register(o)) for k, o in enumerate(operands)]
        if "ftz" in i.op and t == "f32":
            xs = [self.temp(f"flush({x})") for x in xs]
        e = form(*xs)
        if "ftz" in i.op and t == "f32":
            e = f"flush({e})"
        if "sat" in i.op and t[0] == "f":
            e = f"saturate({e})"
        if "relu" in i.op:
            e = f"np.maximum({e}, 0)"
        tag = self.tag(result or t)
        if t == "f16" and result is None:
            e = f"({e}).astype('f2')"
        self.put(i.operands[0], e, tag, ex)

    @staticmethod
    def rounding(i: Instruction) -> str:
        return next((x for x in i.op if x in ("rn", "rz", "rm", "rp")), "")

    def i_add(self, i: Instruction) -> None:
        if "cc" in i.op:
            raise NotImplementedError("carry")
        r = self.rounding(i)
        if r in ("rz", "rm", "rp"):
            return self.calc(i, lambda a, b: f"add({a}, {b}, {r!r})", 2)
        self.calc(i, lambda a, b: f"{a} + {b}", 2)

    def i_sub(self, i: Instruction) -> None:
        if "cc" in i.op:
            raise NotImplementedError("carry")
        r = self.rounding(i)
        if r in ("rz", "rm", "rp"):
            return self.calc(i, lambda a, b: f"add({a}, -{b}, {r!r})", 2)
        self.calc(i, lambda a, b: f"{a} - {b}", 2)

    def i_mul(self, i: Instruction) -> None:
        self.product(i, False)

    def i_mad(self, i: Instruction) -> None:
        self.product(i, True)

    def product(self, i: Instruction, plus: bool) -> None:
        t = i.type
        if t[0] == "f" or t.startswith("bf16"):
            if plus:
                return self.i_fma(i)
            r = self.rounding(i)
            if r in ("rz", "rm", "rp"):
                return self.calc(i, lambda a, b: f"mul({a}, {b}, {r!r})", 2)
            return self.calc(i, lambda a, b: f"{a} * {b}", 2)
        if "cc" in i.op:
            raise NotImplementedError("carry")
        if "wide" in i.op:
            ex = self.execute(i)
            wide = f"{_NP[t[0]]}{WIDTH[t] // 4}"
            a, b = (self.src(o, t, k == 0) for k, o in enumerate(i.operands[1:3]))
            e = f"{a}.astype({wide!r}) * {b}.astype({wide!r})"
            if plus:
                e += " + " + self.src(i.operands[3], f"{t[0]}{WIDTH[t] * 2}")
            return self.put(i.operands[0], e, wide, ex)
        form = (lambda a, b: f"high({a}, {b})") if "hi" in i.op else (lambda a, b: f"{a} * {b}")
        if not plus:
            return self.calc(i, form, 2)
        self.calc(i, lambda a, b, c: f"{form(a, b)} + {c}", 3)

    def i_fma(self, i: Instruction) -> None:
        t = i.type
        if t in ("f16", "f16x2", "bf16", "bf16x2"):  # float32 holds the product exactly
            one = "'f4'"
            return self.calc(i, lambda a, b, c: f"{a}.astype({one}) * {b}.astype({one}) + {c}.astype({one})", 3)
        r = self.rounding(i) or "rn"
        self.calc(i, lambda a, b, c: f"fma({a}, {b}, {c}, {r!r})", 3)

    def i_div(self, i: Instruction) -> None:
        self.calc(i, (lambda a, b: f"{a} / {b}") if i.type[0] == "f" else (lambda a, b: f"divide({a}, {b})"), 2)

    def i_rem(self, i: Instruction) -> None:
        self.calc(i, lambda a, b: f"remainder({a}, {b})", 2)

    def i_neg(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"-{a}", 1)

    def i_abs(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"np.abs({a})", 1)

    def extreme(self, i: Instruction, name: str) -> None:
        floating = i.type[0] == "f" or i.type.startswith("bf16")
        f = f"np.{name}imum" if "NaN" in i.op or not floating else f"np.f{name}"
        if "xorsign" in i.op:
            raise NotImplementedError("xorsign")
        if len(i.operands) == 4:
            return self.calc(i, lambda a, b, c: f"{f}({f}({a}, {b}), {c})", 3)
        self.calc(i, lambda a, b: f"{f}({a}, {b})", 2)

    def i_min(self, i: Instruction) -> None:
        self.extreme(i, "min")

    def i_max(self, i: Instruction) -> None:
        self.extreme(i, "max")

    def i_sqrt(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"np.sqrt({a})", 1)

    def i_rsqrt(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"1 / np.sqrt({a})", 1)

    def i_rcp(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"1 / {a}", 1)

    def i_ex2(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"np.exp2({a})", 1)

    def i_lg2(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"np.log2({a})", 1)

    def i_sin(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"np.sin({a})", 1)

    def i_cos(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"np.cos({a})", 1)

    def i_tanh(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"np.tanh({a})", 1)

    def i_copysign(self, i: Instruction) -> None:
        self.calc(i, lambda a, b: f"np.copysign({b}, {a})", 2)

    def i_testp(self, i: Instruction) -> None:
        form = {
            "finite": lambda a: f"np.isfinite({a})", "infinite": lambda a: f"np.isinf({a})", "number": lambda a: f"~np.isnan({a})",
            "notanumber": lambda a: f"np.isnan({a})",
        }[i.op[1]]  # fmt: skip
        self.put(i.operands[0], form(self.src(i.operands[1], i.type, True)), "pred", self.execute(i))

    # Bits ---------------------------------------------------------------------------------------------------------------

    def bitwise(self, i: Instruction, sign: str) -> None:
        if i.type == "pred":
            ex = self.execute(i)
            a, b = (self.src(o, "pred", True) for o in i.operands[1:3])
            return self.put(i.operands[0], f"{a} {sign} {b}", "pred", ex)
        self.calc(i, lambda a, b: f"{a} {sign} {b}", 2)

    def i_and(self, i: Instruction) -> None:
        self.bitwise(i, "&")

    def i_or(self, i: Instruction) -> None:
        self.bitwise(i, "|")

    def i_xor(self, i: Instruction) -> None:
        self.bitwise(i, "^")

    def i_not(self, i: Instruction) -> None:
        if i.type == "pred":
            return self.put(i.operands[0], f"~{self.src(i.operands[1], 'pred', True)}", "pred", self.execute(i))
        self.calc(i, lambda a: f"~{a}", 1)

    def i_cnot(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"({a} == 0).astype({a}.dtype)", 1)

    def shift(self, i: Instruction, name: str) -> None:
        ex = self.execute(i)
        a = self.src(i.operands[1], i.type, True)
        tag = self.tag(i.type)
        o = i.operands[2]
        bits = WIDTH[i.type]
        if not self.is_register(o) and int(o.rstrip("U"), 0) < bits:
            k = self.keep(np.dtype(tag).type(int(o.rstrip("U"), 0)))
            return self.put(i.operands[0], f"{a} {'<<' if name == 'shift_left' else '>>'} {k}", tag, ex)
        self.put(i.operands[0], f"{name}({a}, {self.src(o, 'u32')})", tag, ex)

    def i_shl(self, i: Instruction) -> None:
        self.shift(i, "shift_left")

    def i_shr(self, i: Instruction) -> None:
        self.shift(i, "shift_right")

    def i_shf(self, i: Instruction) -> None:
        ex = self.execute(i)
        lo, hi = (self.src(o, "b32", True) for o in i.operands[1:3])
        self.put(i.operands[0], f"funnel({lo}, {hi}, {self.src(i.operands[3], 'b32')}, {'l' in i.op}, {'clamp' in i.op})", "u4", ex)

    def i_lop3(self, i: Instruction) -> None:
        if i.op[1] != "b32":
            raise NotImplementedError("lop3 with a predicate")
        ex = self.execute(i)
        a, b, c = (self.src(o, "b32", True) for o in i.operands[1:4])
        self.put(i.operands[0], f"logic3({a}, {b}, {c}, {int(i.operands[4], 0)})", "u4", ex)

    def i_bfe(self, i: Instruction) -> None:
        ex = self.execute(i)
        a, at, n = self.src(i.operands[1], i.type, True), self.src(i.operands[2], "u32"), self.src(i.operands[3], "u32")
        self.put(i.operands[0], f"extract({a}, {at}, {n})", self.tag(i.type), ex)

    def i_bfi(self, i: Instruction) -> None:
        ex = self.execute(i)
        a, b = (self.src(o, i.type, True) for o in i.operands[1:3])
        self.put(i.operands[0], f"insert({a}, {b}, {self.src(i.operands[3], 'u32')}, {self.src(i.operands[4], 'u32')})", self.tag(i.type), ex)

    def i_prmt(self, i: Instruction) -> None:
        if i.op[1:] != ["b32"]:
            raise NotImplementedError("prmt mode")
        ex = self.execute(i)
        a, b = (self.src(o, "b32", True) for o in i.operands[1:3])
        self.put(i.operands[0], f"permute({a}, {b}, {self.src(i.operands[3], 'b32')})", "u4", ex)

    def i_popc(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"bits_set({a})", 1, result="u32")

    def i_clz(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"leading_zeros({a})", 1, result="u32")

    def i_brev(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"reverse_bits({a})", 1)

    def i_bfind(self, i: Instruction) -> None:
        self.calc(i, lambda a: f"find_top({a}, {'shiftamt' in i.op})", 1, result="u32")

    # Comparing and converting -------------------------------------------------------------------------------------------

    def comparison(self, i: Instruction) -> str:
        t = i.type
        c = i.op[1]
        floating = t[0] == "f" or t.startswith("bf16")
        if t.endswith("x2"):
            raise NotImplementedError("packed comparison")
        a, b = self.src(i.operands[1 if i.op[0] != "setp" else 1], t, True), self.src(i.operands[2], t)
        if "ftz" in i.op and t == "f32":
            a, b = self.temp(f"flush({a})"), self.temp(f"flush({b})")
        if not floating:
            sign = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}[c]
            return self.temp(f"{a} {sign} {b}")
        if c in ("nan", "num"):
            return self.temp(f"np.isnan({a}) | np.isnan({b})" if c == "nan" else f"~(np.isnan({a}) | np.isnan({b}))")
        ordered = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
        if c in ordered:
            return self.temp(f"{a} {ordered[c]} {b}")
        if c == "ne":  # ordered
            return self.temp(f"({a} < {b}) | ({a} > {b})")
        opposite = {"equ": None, "neu": "!=", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[c]
        if c == "equ":
            return self.temp(f"~(({a} < {b}) | ({a} > {b}))")
        return self.temp(f"{a} != {b}" if c == "neu" else f"~({a} {opposite} {b})")

    def i_setp(self, i: Instruction) -> None:
        ex = self.execute(i)
        r = self.comparison(i)
        combine = next((x for x in i.op[2:] if x in ("and", "or", "xor")), None)
        dst = i.operands[0].split("|")
        other = self.temp(f"~{r}") if len(dst) > 1 else None
        if combine:
            c = self.src(i.operands[3], "pred", True)
            sign = {"and": "&", "or": "|", "xor": "^"}[combine]
            r = f"{r} {sign} {c}"
            other = f"{other} {sign} {c}" if other else None
        self.put(dst[0].strip(), r, "pred", ex)
        if other:
            self.put(dst[1].strip(), other, "pred", ex)

    def i_set(self, i: Instruction) -> None:
        ex = self.execute(i)
        d = i.op[-2]
        r = self.comparison(i)
        if len(i.operands) > 3:
            raise NotImplementedError("set with a predicate")
        e = f"{r}.astype('f4')" if d == "f32" else f"where({r}, np.uint32(0xFFFFFFFF), np.uint32(0))"
        self.put(i.operands[0], e, self.tag(d), ex)

    def i_selp(self, i: Instruction) -> None:
        ex = self.execute(i)
        t = i.type
        a, b = self.src(i.operands[1], t), self.src(i.operands[2], t)
        self.put(i.operands[0], f"where({self.src(i.operands[3], 'pred', True)}, {a}, {b})", self.tag(t), ex)

    def i_slct(self, i: Instruction) -> None:
        ex = self.execute(i)
        t = i.op[-2]
        a, b, c = self.src(i.operands[1], t), self.src(i.operands[2], t), self.src(i.operands[3], i.type, True)
        self.put(i.operands[0], f"where({c} >= 0, {a}, {b})", self.tag(t), ex)

    def i_cvt(self, i: Instruction) -> None:
        ex = self.execute(i)
        dt, st = i.op[-2], i.op[-1]
        if dt in ("f16x2", "bf16x2") and len(i.operands) == 3:
            hi, lo = (self.src(o, "f32", True) for o in i.operands[1:3])
            if "relu" in i.op or "satfinite" in i.op:
                raise NotImplementedError("cvt modifier")
            to = (lambda x: f"{x}.astype('f2').view('u2')") if dt == "f16x2" else (lambda x: f"to_bf16({x}, {'rz' in i.op})")
            return self.put(i.operands[0], f"{to(lo)}.astype('u4') | {to(hi)}.astype('u4') << np.uint32(16)", "u4", ex)
        if dt == "tf32":
            return self.put(i.operands[0], f"(({self.src(i.operands[1], 'b32', True)} + np.uint32(0x1000)) & np.uint32(0xFFFFE000))", "u4", ex)
        if {"e4m3x2", "e5m2x2", "satfinite", "relu"} & set(i.op):
            raise NotImplementedError("cvt modifier")
        source_float = st[0] == "f" or st == "bf16"
        target_float = dt[0] == "f" or dt == "bf16"
        o = i.operands[1]
        # The register may be wider than the type: its low bits count.
        if self.is_register(o) and self.p.widths[self.p.registers[o]] > WIDTH[st]:
            w = self.p.widths[self.p.registers[o]] // 8
            a = self.temp(f"{self.reg(o, f'u{w}')}.astype('u{WIDTH[st] // 8}')")
            a = self.temp(f"from_bf16({a})" if st == "bf16" else f"{a}.view({self.tag(st)!r})")
        else:
            a = self.src(o, st, True)
        kind = next((x for x in i.op if x in _ROUNDINGS), None)
        if "ftz" in i.op and st == "f32":
            a = self.temp(f"flush({a})")
        if source_float and not target_float:
            return self.put(i.operands[0], f"to_integer({a}, {kind!r}, np.{np.dtype(self.tag(dt)).name})", self.tag(dt), ex)
        if kind:
            a = self.temp({"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}[kind] + f"({a})")
        if "sat" in i.op:
            if not target_float:
                info = np.iinfo(self.tag(dt))
                a = self.temp(f"np.clip({a}, max(np.iinfo({a}.dtype).min, {info.min}), min(np.iinfo({a}.dtype).max, {info.max}))")
            else:
                a = self.temp(f"saturate({a})")
        r = self.rounding(i)
        if dt == "bf16":
            return self.put(i.operands[0], f"to_bf16({a}.astype('f4'), {r == 'rz'})", "u2", ex)
        if target_float and r in ("rz", "rm", "rp") and WIDTH[dt] < 64:
            return self.put(i.operands[0], f"rounded({a}.astype('f8'), {r!r}, np.{np.dtype(self.tag(dt)).name})", self.tag(dt), ex)
        self.put(i.operands[0], f"{a}.astype({self.tag(dt)!r})", self.tag(dt), ex)

    # Warps --------------------------------------------------------------------------------------------------------------

    def i_shfl(self, i: Instruction) -> None:
        if "sync" not in i.op:
            raise NotImplementedError("shfl without sync")
        ex = self.execute(i)
        d = [x.strip() for x in i.operands[0].split("|")]
        kind = next(x for x in i.op if x in ("up", "down", "bfly", "idx"))
        v = self.src(i.operands[1], "b32", True)
        b, c, member = (self.src(o, "u32") for o in i.operands[2:5])
        got = self.temp(f"g.shfl({kind!r}, {v}, {b}, {c}, {member}, {ex}, {self.site})")
        self.put(d[0], f"{got}[0]", "u4", ex)
        if len(d) > 1:
            self.put(d[1], f"{got}[1]", "pred", ex)

    def i_vote(self, i: Instruction) -> None:
        ex = self.execute(i)
        kind = next(x for x in i.op if x in ("ballot", "any", "all", "uni"))
        p = self.src(i.operands[1], "pred", True)
        member = self.src(i.operands[2], "u32") if len(i.operands) > 2 else "None"
        self.put(i.operands[0], f"g.vote({kind!r}, {p}, {member}, {ex})", "u4" if kind == "ballot" else "pred", ex)

    def i_redux(self, i: Instruction) -> None:
        ex = self.execute(i)
        kind = next(x for x in i.op if x in ("add", "min", "max", "and", "or", "xor"))
        v = self.src(i.operands[1], i.type, True)
        self.put(i.operands[0], f"g.redux({kind!r}, {v}, {self.src(i.operands[2], 'u32')}, {ex}, {self.site})", self.tag(i.type), ex)

    def i_match(self, i: Instruction) -> None:
        if "any" not in i.op:
            raise NotImplementedError("match.all")
        ex = self.execute(i)
        self.put(i.operands[0], f"g.match_any({self.src(i.operands[1], i.type, True)}, {self.src(i.operands[2], 'u32')}, {ex})", "u4", ex)

    def i_elect(self, i: Instruction) -> None:
        ex = self.execute(i)
        d = [x.strip() for x in i.operands[0].split("|")]
        got = self.temp(f"g.elect({self.src(i.operands[1], 'u32')}, {ex})")
        self.put(d[0], f"{got}[0]", "u4", ex)
        self.put(d[1], f"{got}[1]", "pred", ex)

    def i_activemask(self, i: Instruction) -> None:
        ex = self.execute(i)
        self.put(i.operands[0], f"g.active({ex})", "u4", ex)

    def i_bar(self, i: Instruction) -> None:
        if "warp" in i.op:
            return self.say(f"g.warp_barrier({self.src(i.operands[0], 'u32')}, {self.execute(i)}, {self.site})")
        if "arrive" in i.op:
            ids, count = (self.src(o, "u32", True) for o in i.operands[:2])
            return self.say(f"g.arrive({ids}, {count}, {self.execute(i)})")
        raise NotImplementedError("barrier")

    i_barrier = i_bar

    def i_ldmatrix(self, i: Instruction) -> None:
        if "m8n8" not in i.op or i.type != "b16":
            raise NotImplementedError("ldmatrix shape")
        ex = self.execute(i)
        d = self.vector(i.operands[0])
        a, offset = self.address(i.operands[1])
        got = self.temp(f"g.ldmatrix({a}, {offset}, {len(d)}, {'trans' in i.op}, {ex})")
        for k, r in enumerate(d):
            self.put(r, f"{got}[{k}]", "u4", ex)

    def i_stmatrix(self, i: Instruction) -> None:
        if "m8n8" not in i.op or i.type != "b16":
            raise NotImplementedError("stmatrix shape")
        a, offset = self.address(i.operands[0])
        values = ", ".join(self.src(r, "b32", True) for r in self.vector(i.operands[1]))
        self.say(f"g.stmatrix({a}, {offset}, [{values}], {'trans' in i.op}, {self.execute(i)})")

    def i_mma(self, i: Instruction) -> None:
        shape = next(x for x in i.op if x.startswith("m16n8"))
        dt, at, bt, ct = i.op[-4:]
        if (dt, ct) != ("f32", "f32") or (shape, at) not in (("m16n8k8", "tf32"), ("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16")):
            raise NotImplementedError("mma shape")
        ex = self.execute(i)
        if ex is not None:
            raise NotImplementedError("mma in part of a warp")
        D, A, B, C = (self.vector(o) for o in i.operands)
        a, b = (", ".join(self.src(r, "b32", True) for r in x) for x in (A, B))
        c = ", ".join(self.src(r, "f32", True) for r in C)
        got = self.temp(f"g.mma({shape!r}, {at!r}, {bt!r}, [{a}], [{b}], [{c}])")
        for k, r in enumerate(D):
            self.put(r, f"{got}[{k}]", "f4", None)

    # Leaving a block ----------------------------------------------------------------------------------------------------

    def finish(self, end: Instruction | None) -> None:
        after = self.index + 1
        if end is None:
            return self.say(f"g.goto({after}, m)")
        op = end.op
        if op[0] == "bra":
            target = self.p.labels[end.operands[0]]
            if not end.guard:
                if target <= self.index:
                    self.say(f"g.m.report.repeated.add({self.index})")
                return self.say(f"g.goto({target}, m)")
            p = self.reg(end.guard, "pred")
            return self.say(f"g.branch({'~' if end.negated else ''}{p}, {target}, {after}, m)")
        if op[0] == "brx":
            targets = [self.p.labels[t] for t in self.p.tables[end.operands[1]]]
            if end.guard:
                raise NotImplementedError(end.text)
            return self.say(f"g.switch({self.src(end.operands[0], 'u32', True)}, {targets}, m)")
        if op[0] in ("ret", "exit"):
            p = "None"
            if end.guard:
                p = ("~" if end.negated else "") + self.reg(end.guard, "pred")
            return self.say(f"g.leave({p}, {after}, m)")
        if op[0] == "trap":
            return self.say(f"g.trap({end.text!r}, {self.execute(end) if end.guard else 'm'}, {after}, m)")
        if end.guard:
            raise NotImplementedError(f"{end.text}: a barrier under a predicate")
        operands = list(end.operands)
        value = "None"
        if "red" in op:
            operands.pop(0)
            value = self.src(operands.pop(), "pred", True)
        name = self.src(operands[0], "u32") if operands else "0"
        count = self.src(operands[1], "u32") if len(operands) > 1 else "0"
        self.say(f"g.wait({self.index}, {name}, {count}, {value}, m)")
