"""The pieces of which the code of an instruction is made: registers, constants, addresses, results."""

from __future__ import annotations

import re
from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import numpy as np

from ptx_program import WIDTH, Block, Instruction
from ptx_runtime import RUNTIME

if TYPE_CHECKING:
    from ptx_code import Translator

__all__ = ["NP", "Emitter"]

NP = {"u": "u", "s": "i", "b": "u", "f": "f"}


@cache
def compiled(text: str) -> CodeType:
    return next(c for c in compile(text, "<a block of PTX>", "exec").co_consts if isinstance(c, CodeType))


class Emitter:
    """Code of one block: what instructions are made of. Their own methods, i_<name> and finish, come with the subclasses."""

    def __init__(self, of: Translator, index: int):
        self.of, self.p, self.index = of, of.program, index
        self.block: Block = self.p.blocks[index]
        self.lines: list[str] = []
        self.names = dict(RUNTIME)
        self.views: dict[int, dict[str, str]] = {}
        self.before: set[int] = set()
        """Registers whose value from before the block is read."""
        self.written: dict[int, None] = {}
        self.fresh = 0

    # Pieces -------------------------------------------------------------------------------------------------------------

    def function(self) -> tuple:
        """The function, and which registers its results are: those that other blocks, or this one in its next turn, may read."""
        for k, i in enumerate(self.block.body):
            self.site = self.keep((self.index, k))
            self.translate(i)
        self.finish(self.block.end)
        out = [k for k in self.written if self.of.within[k] != self.index or k in self.before]
        results = "".join(f"{self.view(k, self.of.homes[k])}, " for k in out)
        text = "def f(g, R, m):\n" + "".join(f"    {line}\n" for line in self.lines) + f"    return ({results})\n"
        return FunctionType(compiled(text), self.names), out

    def say(self, line: str) -> None:
        self.lines.append(line)

    def temp(self, expression: str) -> str:
        self.fresh += 1
        name = f"t{self.fresh}"
        self.say(f"{name} = {expression}")
        return name

    def keep(self, value) -> str:
        """A name for a number: blocks that do the same with other registers, constants and targets have the same text."""
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
        """Name of the predicate of lanes that execute, of those in the block's mask; None for all."""
        if not i.guard:
            return None
        p = self.reg(i.guard, "pred")
        return self.temp(f"~{p}") if i.negated else p

    def lanes(self, ex: str | None) -> str:
        """Of a predicate those in the block's mask."""
        return "m" if ex is None else f"g.both(m, {ex})"

    def guarded(self, ex: str | None) -> str:
        """The mask of an access to memory: `ex`, unless a mutant lacks the predicate."""
        return "m" if ex is None else f"g.guarded({self.lanes(ex)}, m, {self.site})"

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
        return f"{NP[t[0]]}{WIDTH[t] // 8}"

    def is_register(self, o: str) -> bool:
        return o in self.p.registers

    def reg(self, name: str, tag: str) -> str:
        """A register in a dtype of its width."""
        if name.startswith("!"):
            return f"(~{self.reg(name[1:], tag)})"
        k = self.p.registers[name]
        if tag not in ("pred", "bf16") and int(tag[1:]) * 8 != self.p.widths[k]:
            raise NotImplementedError(f"{name} of {self.p.widths[k]} bits read as {tag}")
        return self.view(k, tag)

    def view(self, k: int, tag: str) -> str:
        views = self.views.get(k)
        if views is None:
            self.before.add(k)
            views = self.views[k] = {self.of.homes[k]: self.temp(f"R[{self.keep(k)}]")}
        if tag not in views:
            if tag == "bf16":
                views[tag] = self.temp(f"from_bf16({self.view(k, 'u2')})")
            else:
                first = next(v for t, v in views.items() if t != "bf16")
                views[tag] = self.temp(f"{first}.view({tag!r})")
        return views[tag]

    def write(self, k: int, tag: str, name: str) -> None:
        self.written[k] = None
        self.views[k] = {tag: name}

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
            return self.temp(f"g.const(np.{np.dtype(tag).name}(g.m.where['parameters'] + {self.keep(self.p.parameters[o][0])}))")
        elif o in self.p.constants:
            return self.temp(f"g.const(np.{np.dtype(tag).name}(g.m.where[{o!r}]))")
        else:
            value = self.constant(o, tag)
        if not vector:
            return self.keep(value)
        return f"g.constants[{self.keep((value.dtype.char, value.tobytes()))}]"

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
        if ex is not None:
            expression = f"where({ex}, {expression}, {self.reg(dst, tag)})"
        self.write(k, tag, expression if expression.isidentifier() else self.temp(expression))

    def vector(self, o: str) -> list[str]:
        return [x.strip() for x in o.strip("{} ").split(",")] if o.startswith("{") else [o]

    def address(self, o: str) -> tuple[str, str]:
        """(vector expression, name of the constant offset)"""
        m = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", o)
        if not m:
            raise NotImplementedError(f"address {o}")
        offset = self.keep(int(m[2] or "0", 0))
        if self.is_register(m[1]):
            width = self.p.widths[self.p.registers[m[1]]]
            return self.reg(m[1], f"u{width // 8}"), offset
        at = self.symbol(m[1])
        if at is not None:
            return f"g.const({self.keep(np.int64(at))})", offset
        if m[1] in self.p.constants:
            return self.temp(f"g.const(np.int64(g.m.where[{m[1]!r}]))"), offset
        return f"g.const({self.keep(np.int64(int(m[1], 0)))})", offset
