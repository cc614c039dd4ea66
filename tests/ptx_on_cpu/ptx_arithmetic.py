"""Instructions that compute in registers: arithmetic, bits, comparisons, conversions."""

from __future__ import annotations

import numpy as np

from ptx_operands import NP, Emitter
from ptx_program import WIDTH, Instruction

__all__ = ["Arithmetic"]

_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")


class Arithmetic(Emitter):
    # Arithmetic ---------------------------------------------------------------------------------------------------------

    def unsigned(self, i: Instruction, t: str) -> str:
        """The type in which registers are kept, for what gives the same bits whether there is a sign or not."""
        return "u" + t[1:] if t[0] == "s" and self.p.widths[self.p.registers[i.operands[0]]] == WIDTH[t] else t

    def calc(self, i: Instruction, form, sources: int, result: str | None = None, any_sign: bool = False) -> None:
        """dst = form(a, b, ...) in the instruction's type, with .ftz and .sat; packed types half by half."""
        ex = self.execute(i)
        t = self.unsigned(i, i.type) if any_sign else i.type
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
        self.calc(i, lambda a, b: f"{a} + {b}", 2, any_sign=True)

    def i_sub(self, i: Instruction) -> None:
        if "cc" in i.op:
            raise NotImplementedError("carry")
        r = self.rounding(i)
        if r in ("rz", "rm", "rp"):
            return self.calc(i, lambda a, b: f"add({a}, -{b}, {r!r})", 2)
        self.calc(i, lambda a, b: f"{a} - {b}", 2, any_sign=True)

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
            wide = f"{NP[t[0]]}{WIDTH[t] // 4}"
            a, b = (self.src(o, t, k == 0) for k, o in enumerate(i.operands[1:3]))
            e = f"{a}.astype({wide!r}) * {b}.astype({wide!r})"
            if plus:
                e += " + " + self.src(i.operands[3], f"{t[0]}{WIDTH[t] * 2}")
            return self.put(i.operands[0], e, wide, ex)
        form = (lambda a, b: f"high({a}, {b})") if "hi" in i.op else (lambda a, b: f"{a} * {b}")
        if not plus:
            return self.calc(i, form, 2, any_sign="hi" not in i.op)
        self.calc(i, lambda a, b, c: f"{form(a, b)} + {c}", 3, any_sign="hi" not in i.op)

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
        self.calc(i, lambda a: f"-{a}", 1, any_sign=True)

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
        if t.endswith("x2"):
            raise NotImplementedError("packed comparison")
        if i.op[1] in ("eq", "ne") and t[0] == "s":
            t = "u" + t[1:]
        a, b = self.src(i.operands[1], t, True), self.src(i.operands[2], t)
        if "ftz" in i.op and t == "f32":
            a, b = self.temp(f"flush({a})"), self.temp(f"flush({b})")
        return self.compared(i.op[1], a, b, t[0] == "f" or t == "bf16")

    def compared(self, c: str, a: str, b: str, floating: bool) -> str:
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
        combine = next((x for x in i.op[2:] if x in ("and", "or", "xor")), None)
        dst = i.operands[0].split("|")
        if i.type in ("f16x2", "bf16x2"):  # the low halves into the first, the high ones into the second
            if len(dst) != 2:
                raise NotImplementedError("packed comparison into one predicate")
            of = (lambda v: f"{v}.view('f2')") if i.type == "f16x2" else (lambda v: f"from_bf16({v}.view('u2'))")
            a, b = (self.temp(of(self.src(o, "b32", True))) for o in i.operands[1:3])
            r, other = (self.compared(i.op[1], f"{a}[{k}::2]", f"{b}[{k}::2]", True) for k in (0, 1))
        else:
            r = self.comparison(i)
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
        t = self.unsigned(i, i.type)
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
