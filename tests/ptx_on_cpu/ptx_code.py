"""Basic blocks of PTX to Python functions on NumPy vectors, one element a lane.

A block's function takes (group, registers, mask) and returns the new values of registers that others may read: of all lanes, though
under a mask only those in it count. Memory, control and what a warp does together see the mask. A register is a vector of its
declared width, between blocks always in one dtype, within one in whatever type it is used; arithmetic is NumPy's in that type.
fma rounds twice (in double, then in float), `.approx` functions are exact: tolerances, never bit equality with a GPU.
"""

from __future__ import annotations

import re

import numpy as np

from ptx_arithmetic import Arithmetic
from ptx_operands import NP
from ptx_program import WIDTH, Instruction, Program, is_arrival, is_warp_sync

__all__ = ["Translator"]

_ATOMS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
_ORDERS = {"acquire": "acquire", "release": "release", "acq_rel": "both"}
_NAME = re.compile(r"[%\w$.]+")
_BESIDE_ORDER = {*_ORDERS, *_ATOMS, "global", "shared", "gpu", "sys", "cta", "noftz"}


class Translator:
    """The program's blocks as functions, made when first needed."""

    def __init__(self, program: Program):
        self.program = program
        self.n = len(program.blocks)
        self.sizes = [len(b.body) + (b.end is not None) for b in program.blocks]
        first, sleeps = [b.body[0] if b.body else None for b in program.blocks], program.sleeps
        self.syncs = ["" if i is None else "warp" if is_warp_sync(i) else "arrival" if sleeps and is_arrival(i) else "" for i in first]
        """What a block starts with that not every lane goes through at once."""
        self.reductions: dict[int, tuple[str, int]] = {}
        """Barriers with a result: block index -> (kind, register)."""
        self.steps: list[tuple | None] = [None] * self.n
        """Of blocks that ran: the function, and the registers whose new values it returns."""
        self.homes = ["pred" if w == 1 else f"u{w // 8}" for w in program.widths]
        """In what dtype a register is kept from block to block: float if the first instruction that writes it computes one."""
        self.within: list[int | None] = [None] * len(program.widths)
        """The only block that has this register; -1 if there are several."""
        for k, b in enumerate(program.blocks):
            for i in [*b.body, b.end] if b.end is not None else b.body:
                self._registers(k, i)
            if b.end is not None and b.end.op[0] in ("bar", "barrier") and "red" in b.end.op:
                self.reductions[k] = (next(x for x in b.end.op if x in ("popc", "or", "and")), program.registers[b.end.operands[0]])
                self.within[self.reductions[k][1]] = -1

    def _registers(self, k: int, i: Instruction) -> None:
        """Notes those of an instruction of block k: where they occur, how they are kept."""
        known, within = self.program.registers, self.within
        kind = i.op[-2 if i.op[0] == "cvt" else -1]
        home = {"f32": "f4", "f64": "f8"}.get(kind) if i.op[0] not in ("ld", "mov", "st") else None
        for at, o in enumerate([*i.operands, i.guard]):
            for name in (o,) if o in known else _NAME.findall(o):
                r = known.get(name)
                if r is not None:
                    if within[r] is None:
                        within[r] = k
                        if home and at == 0 and self.program.widths[r] == WIDTH[kind]:
                            self.homes[r] = home
                    elif within[r] != k:
                        within[r] = -1

    def step(self, b: int) -> tuple:
        self.steps[b] = _Block(self, b).function()
        return self.steps[b]


class _Block(Arithmetic):
    """All instructions: besides arithmetic those of memory, of warps and of control."""

    # Moving -------------------------------------------------------------------------------------------------------------

    @staticmethod
    def space(op: list[str]) -> str:
        for s in ("global", "shared", "local", "const", "param"):
            if s in op:
                return s
        return "generic"

    @staticmethod
    def order(i: Instruction) -> str:
        """acquire, release, both or nothing. Orders of fewer than all blocks are none between blocks."""
        found = [_ORDERS[x] for x in i.op if x in _ORDERS]
        if not found:
            return ""
        if len(found) > 1 or set(i.op[1:-1]) - _BESIDE_ORDER or len({"gpu", "sys", "cta"} & set(i.op)) > 1:
            raise NotImplementedError("an order with other modifiers")
        return "" if "cta" in i.op else found[0]

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
                    e = f"g.const(np.frombuffer(g.m.parameters, {self.tag('u' + t[1:] if t[0] == 'b' else t)!r}, 1, {self.keep(at + k * size)})[0])"
                    self.put(r, e, self.tag("u" + t[1:] if t[0] == "b" else t), ex)
                return
            space = "const" if m and self.is_register(m[1]) else "local"
        a, offset = self.address(operands[0])
        space = space if space != "const" else "const"
        order = self.order(i)
        if order and (order != "acquire" or len(d) != 1 or i.op[0] != "ld"):
            raise NotImplementedError("load")
        olds = None if ex is None and not order else "(" + "".join(self._old(r, size) + ", " for r in d) + ")"
        if order:
            got = self.temp(f"g.ld_acquire({a}, {offset}, {size}, {space!r}, {self.lanes(ex)}, {olds}, {self.site})")
        else:
            got = self.temp(f"g.ld({a}, {offset}, {size}, {len(d)}, {space!r}, {self.guarded(ex)}, {olds})")
        narrow = f"{NP[t[0]]}{size}"
        for k, r in enumerate(d):
            if r == "_":
                continue
            e = f"{got}[{k}]"
            width = self.p.widths[self.p.registers[r]]
            if width == size * 8:
                self.write(self.p.registers[r], f"u{size}", self.temp(e))
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
        order = self.order(i)
        if order:
            if order != "release" or len(values) != 1:
                raise NotImplementedError("store")
            return self.say(f"g.st_release({a}, {offset}, {size}, [{values[0]}], {space!r}, {self.lanes(ex)}, {self.site})")
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
        got = f"g.atom({a}, {offset}, {size}, {kind!r}, {tag!r}, [{values}], {self.space(i.op)!r}, {self.lanes(ex)}, {old}, {self.order(i)!r}, {self.site})"
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
        self.say(f"g.cp_async({dst}, {o1}, {src}, {o2}, {size}, {n}, {self.lanes(ex)})")

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

    i_prefetch = i_prefetchu = i_membar = i_fence = i_griddepcontrol = i_applypriority = i_discard = _hint

    def i_createpolicy(self, i: Instruction) -> None:
        self.put(i.operands[0], f"g.const({self.keep(np.uint64(0))})", "u8", self.execute(i))

    # Warps --------------------------------------------------------------------------------------------------------------

    def i_shfl(self, i: Instruction) -> None:
        if "sync" not in i.op:
            raise NotImplementedError("shfl without sync")
        ex = self.execute(i)
        d = [x.strip() for x in i.operands[0].split("|")]
        kind = next(x for x in i.op if x in ("up", "down", "bfly", "idx"))
        v = self.src(i.operands[1], "b32", True)
        b, c, member = (self.src(o, "u32") for o in i.operands[2:5])
        got = self.temp(f"g.shfl({kind!r}, {v}, {b}, {c}, {member}, {self.lanes(ex)}, {self.site})")
        self.put(d[0], f"{got}[0]", "u4", ex)
        if len(d) > 1:
            self.put(d[1], f"{got}[1]", "pred", ex)

    def i_vote(self, i: Instruction) -> None:
        ex = self.execute(i)
        kind = next(x for x in i.op if x in ("ballot", "any", "all", "uni"))
        p = self.src(i.operands[1], "pred", True)
        member = self.src(i.operands[2], "u32") if len(i.operands) > 2 else "None"
        self.put(i.operands[0], f"g.vote({kind!r}, {p}, {member}, {self.lanes(ex)})", "u4" if kind == "ballot" else "pred", ex)

    def i_redux(self, i: Instruction) -> None:
        ex = self.execute(i)
        kind = next(x for x in i.op if x in ("add", "min", "max", "and", "or", "xor"))
        v = self.src(i.operands[1], i.type, True)
        self.put(i.operands[0], f"g.redux({kind!r}, {v}, {self.src(i.operands[2], 'u32')}, {self.lanes(ex)}, {self.site})", self.tag(i.type), ex)

    def i_match(self, i: Instruction) -> None:
        if "any" not in i.op:
            raise NotImplementedError("match.all")
        ex = self.execute(i)
        self.put(i.operands[0], f"g.match_any({self.src(i.operands[1], i.type, True)}, {self.src(i.operands[2], 'u32')}, {self.lanes(ex)})", "u4", ex)

    def i_elect(self, i: Instruction) -> None:
        ex = self.execute(i)
        d = [x.strip() for x in i.operands[0].split("|")]
        got = self.temp(f"g.elect({self.src(i.operands[1], 'u32')}, {self.lanes(ex)})")
        self.put(d[0], f"{got}[0]", "u4", ex)
        self.put(d[1], f"{got}[1]", "pred", ex)

    def i_activemask(self, i: Instruction) -> None:
        ex = self.execute(i)
        self.put(i.operands[0], f"g.active({self.lanes(ex)})", "u4", ex)

    def i_bar(self, i: Instruction) -> None:
        if "warp" in i.op:
            return self.say(f"g.warp_barrier({self.src(i.operands[0], 'u32')}, {self.lanes(self.execute(i))}, {self.site})")
        if "arrive" in i.op:
            ids, count = (self.src(o, "u32", True) for o in i.operands[:2])
            return self.say(f"g.arrive({ids}, {count}, {self.lanes(self.execute(i))})")
        raise NotImplementedError("barrier")

    i_barrier = i_bar

    def i_ldmatrix(self, i: Instruction) -> None:
        if "m8n8" not in i.op or i.type != "b16":
            raise NotImplementedError("ldmatrix shape")
        ex = self.execute(i)
        d = self.vector(i.operands[0])
        a, offset = self.address(i.operands[1])
        got = self.temp(f"g.ldmatrix({a}, {offset}, {len(d)}, {'trans' in i.op}, {self.lanes(ex)})")
        for k, r in enumerate(d):
            self.put(r, f"{got}[{k}]", "u4", ex)

    def i_stmatrix(self, i: Instruction) -> None:
        if "m8n8" not in i.op or i.type != "b16":
            raise NotImplementedError("stmatrix shape")
        a, offset = self.address(i.operands[0])
        values = ", ".join(self.src(r, "b32", True) for r in self.vector(i.operands[1]))
        self.say(f"g.stmatrix({a}, {offset}, [{values}], {'trans' in i.op}, {self.lanes(self.execute(i))})")

    def i_mma(self, i: Instruction) -> None:
        shape = next(x for x in i.op if x.startswith("m16n8"))
        dt, at, bt, ct = i.op[-4:]
        if (dt, ct) != ("f32", "f32") or (shape, at) not in (("m16n8k8", "tf32"), ("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16")):
            raise NotImplementedError("mma shape")
        if i.guard:
            raise NotImplementedError("mma in part of a warp")
        D, A, B, C = (self.vector(o) for o in i.operands)
        a, b = (", ".join(self.src(r, "b32", True) for r in x) for x in (A, B))
        c = ", ".join(self.src(r, "f32", True) for r in C)
        got = self.temp(f"g.mma({shape!r}, {at!r}, {bt!r}, [{a}], [{b}], [{c}], m)")
        for k, r in enumerate(D):
            self.put(r, f"{got}[{k}]", "f4", None)

    # Leaving a block ----------------------------------------------------------------------------------------------------

    def finish(self, end: Instruction | None) -> None:
        after = self.keep(self.index + 1)
        if end is None:
            return self.say(f"g.goto({after}, m)")
        op = end.op
        if op[0] == "bra":
            target = self.keep(self.p.labels[end.operands[0]])
            if not end.guard:
                if self.names[target] <= self.index:
                    self.say(f"g.m.report.repeated.add({self.keep(self.index)})")
                return self.say(f"g.goto({target}, m)")
            p = self.reg(end.guard, "pred")
            return self.say(f"g.branch({'~' if end.negated else ''}{p}, {target}, {after}, m)")
        if op[0] == "brx":
            targets = [self.p.labels[t] for t in self.p.tables[end.operands[1]]]
            if end.guard:
                raise NotImplementedError(end.text)
            return self.say(f"g.switch({self.src(end.operands[0], 'u32', True)}, {self.keep(targets)}, m)")
        if op[0] in ("ret", "exit"):
            p = "None"
            if end.guard:
                p = ("~" if end.negated else "") + self.reg(end.guard, "pred")
            return self.say(f"g.leave({p}, {after}, m)")
        if op[0] == "trap":
            return self.say(f"g.trap({end.text!r}, {self.lanes(self.execute(end))}, {after}, m)")
        if op[0] == "nanosleep":
            if op != ["nanosleep", "u32"] or len(end.operands) != 1:
                raise NotImplementedError(end.text)
            return self.say(f"g.sleep({self.lanes(self.execute(end))}, {after}, m)")
        if end.guard:
            raise NotImplementedError(f"{end.text}: a barrier under a predicate")
        operands = list(end.operands)
        value = "None"
        if "red" in op:
            operands.pop(0)
            value = self.src(operands.pop(), "pred", True)
        name = self.src(operands[0], "u32") if operands else "0"
        count = self.src(operands[1], "u32") if len(operands) > 1 else "0"
        self.say(f"g.wait({self.keep(self.index)}, {name}, {count}, {value}, m)")
