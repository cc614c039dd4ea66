"""PTX text to basic blocks: what `ptx_machine` executes. Nothing is skipped in silence: what is not understood raises."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache, cached_property

__all__ = ["Block", "Instruction", "Module", "Program", "PtxError", "WIDTH", "is_arrival", "is_warp_sync"]

# Bits of a register or operand type.
WIDTH = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
WIDTH |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "tf32": 32, "pred": 1}

_ENDS = ("bra", "brx", "ret", "exit", "trap")


class PtxError(RuntimeError):
    """The kernel did something that no kernel may do."""


@dataclass(slots=True)
class Instruction:
    op: list[str]
    operands: tuple[str, ...]
    text: str
    guard: str = ""
    """Name of the predicate register, or empty."""
    negated: bool = False
    line: str = ""
    """Where it comes from: "file:line", and of inlined functions "<file:line" of the caller."""

    @property
    def type(self) -> str:
        return self.op[-1]


@dataclass(slots=True)
class Block:
    """Instructions with one entry and one way out: `end` branches, waits or leaves; without it control falls through."""

    body: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


@dataclass
class Program:
    name: str
    parameters: dict[str, tuple[int, int]]
    """Name -> (offset in the parameter space, bytes)."""
    blocks: list[Block]
    labels: dict[str, int]
    tables: dict[str, list[str]]
    """Branch targets of brx.idx."""
    registers: dict[str, int]
    widths: list[int]
    shared: dict[str, int]
    shared_bytes: int
    local: dict[str, int]
    local_bytes: int
    constants: dict[str, bytes]
    """Module variables with their initial bytes."""
    max_threads: int | None
    """.maxntid or .reqntid, if there is one."""
    text: str

    @cached_property
    def sleeps(self) -> bool:
        """Whether its blocks may wait for each other: nanosleep stands in such loops."""
        return any(b.end is not None and b.end.op[0] == "nanosleep" for b in self.blocks)

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression."""
        return sum(bool(re.search(pattern, i.text)) for b in self.blocks for i in [*b.body, *([b.end] if b.end else [])])


def is_warp_sync(i: Instruction) -> bool:
    """Waits for the lanes its mask names, wherever they are. Such an instruction starts a block."""
    return i.op[0] in ("shfl", "vote", "match", "redux", "elect") or (i.op[0] in ("bar", "barrier") and "warp" in i.op)


def is_arrival(i: Instruction) -> bool:
    """Tells other blocks of something. Where blocks wait for each other such an instruction starts a block."""
    return i.op[0] in ("red", "atom", "st") and bool({"release", "acq_rel"} & set(i.op))


def _uncomment(text: str) -> str:
    text = re.sub(r"// (begin|end) inline asm", r".pragma \1", text)  # its lines count on from the statement's
    return re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.S)


def _braced(text: str, start: int) -> str:
    """What stands inside the braces that open at or after `start`."""
    open_at = text.index("{", start)
    depth = 0
    for m in re.finditer(r"[{}]", text[open_at:]):
        depth += 1 if m[0] == "{" else -1
        if depth == 0:
            return text[open_at + 1 : open_at + m.start()]
    raise PtxError("unbalanced braces")


_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^]]*\]|\([^)]*\)|[^,{[(])+")


def split_operands(text: str) -> list[str]:
    """At commas outside brackets."""
    found = text.split(",") if not {"{", "[", "("} & set(text) else _OPERAND.findall(text)
    return [o.strip() for o in found] if text.strip() else []


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


def _parameters(head: str) -> dict[str, tuple[int, int]]:
    found, top = {}, 0
    for piece in split_operands(head):
        m = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)((?:\s+\.\w+(?:\s+\d+)?)*)\s+([\w$%]+)(?:\[(\d+)\])?", piece)
        if not m:
            raise NotImplementedError(f"parameter {piece!r}")
        size = WIDTH[m[2]] // 8 * int(m[5] or 1)
        top = _align(top, int(m[1] or min(size, 8)))
        found[m[4]] = (top, size)
        top += size
    return found


def _initial(kind: str, count: int, values: str) -> bytes:
    size = WIDTH[kind] // 8
    data = b""
    for v in split_operands(values):
        if v[:2].lower() in ("0f", "0d"):
            data += int(v[2:], 16).to_bytes(size, "little")
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", v):
            data += (int(v.rstrip("U"), 0) & (1 << 8 * size) - 1).to_bytes(size, "little")
        else:
            raise NotImplementedError(f"initial value {v!r}")
    return data.ljust(size * count, b"\0")


_VARIABLE = re.compile(
    r"\.(global|const)\s+(?:\.align\s+(\d+)\s+)?\.([bsuf]\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*(?:\{([^}]*)\}|([^;]*)))?;"
)


_STATEMENT = re.compile(
    r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w%]+):(?!:)|\.(?P<note>loc|file|pragma)\b(?P<rest>[^\n;]*);?|(?P<statement>[^;]*);)"
)
_INSTRUCTION = re.compile(r"(?:@(!?)\s*(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)


@cache
def _parts(op: str) -> list[str]:
    return op.replace("::cta", "").split(".")


class _Builder:
    """The body of one entry point, with functions inlined where they are called."""

    def __init__(self, text: str):
        self.text, self.sleeps = text, "nanosleep" in text
        self.files = {m[1]: m[2] for m in re.finditer(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text)}
        self.line, self.inline = "", False
        self.registers: dict[str, int] = {}
        self.widths: list[int] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.blocks = [Block()]
        self.local: dict[str, int] = {}
        self.local_bytes = 0
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.inlined = 0
        self.depth = 0

    def declare(self, name: str, width: int) -> None:
        if name in self.registers:
            if self.widths[self.registers[name]] != width:
                raise PtxError(f"register {name} declared twice with different widths")
            return
        self.registers[name] = len(self.widths)
        self.widths.append(width)

    def start_block(self) -> int:
        if self.blocks[-1].body or self.blocks[-1].end is not None:
            self.blocks.append(Block())
        return len(self.blocks) - 1

    def add_shared(self, align: int, name: str, size: int) -> None:
        self.shared_bytes = _align(self.shared_bytes, align)
        self.shared[name] = self.shared_bytes
        self.shared_bytes += size

    def statements(self, body: str):
        """(kind, text): labels, braces and statements in order. Braces of vector operands are no scopes."""
        at, end = 0, len(body.rstrip())
        while at < end:
            m = _STATEMENT.match(body, at)
            if m is None:
                raise NotImplementedError(body[at:].strip()[:80])
            at = m.end()
            if m["statement"] is not None:
                yield ";", " ".join(m["statement"].split())
            elif m["brace"]:
                yield m["brace"], ""
            elif m["label"]:
                yield ":", m["label"]
            elif m["note"] == "pragma":
                self.inline = m["rest"].strip() == "begin"
            elif m["note"] == "loc" and not self.inline:
                places = re.findall(r"(?:^|inlined_at)\s*(\d+)\s+(\d+)\s+\d+", m["rest"])
                self.line = "<".join(f"{self.files.get(file, file)}:{line}" for file, line in places)

    def build(self, body: str, prefix: str, calls: dict[str, str] | None = None) -> None:
        """Appends `body`; names declared in it get `prefix`; `calls` maps its parameters to the caller's."""
        scopes: list[dict[str, str]] = [{}]
        params: dict[str, str] = dict(calls or {})
        leave = f"{prefix}leave" if prefix else ""
        label_scope: dict[str, str] = {}
        fresh = 0

        def name_of(token: str) -> str:
            for scope in reversed(scopes):
                if token in scope:
                    return scope[token]
            return params.get(token, token)

        def renamed(text: str) -> str:
            return re.sub(r"%?[A-Za-z_$][\w$]*(?:\.[xyz]\b)?", lambda m: label_scope.get(m[0]) or name_of(m[0]), text)

        if prefix:
            label_scope = {m[1]: prefix + m[1] for m in re.finditer(r"([$\w%]+):(?!:)", body)}
        pending_label = ""
        for kind, st in self.statements(body):
            if kind == "{":
                scopes.append({})
                continue
            if kind == "}":
                if len(scopes) > 1:
                    scopes.pop()
                continue
            if kind == ":":
                at = self.start_block()
                self.labels[label_scope.get(st, st)] = at
                pending_label = label_scope.get(st, st)
                continue
            if not st.startswith("."):
                self.instruction(renamed(st) if prefix or len(scopes) > 1 else st, st, leave, prefix)
                continue
            m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", st)
            if m:
                for r in m[2].split(","):
                    q = re.fullmatch(r"(%?[\w$]+?)(?:<(\d+)>)?", r.strip())
                    if m[1] not in WIDTH:
                        raise NotImplementedError(f"register type .{m[1]}")
                    names = [q[1]] if q[2] is None else [f"{q[1]}{i}" for i in range(int(q[2]))]
                    for n in names:
                        new = n
                        if prefix or len(scopes) > 1:
                            new = f"{prefix}s{fresh}{n}" if len(scopes) > 1 else prefix + n
                            scopes[-1][n] = new
                        self.declare(new, WIDTH[m[1]])
                    fresh += 1
                continue
            m = re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", st)
            if m:
                self.local_bytes = _align(self.local_bytes, int(m[1]))
                new = prefix + m[2]
                scopes[0][m[2]] = new
                self.local[new] = self.local_bytes
                self.local_bytes += int(m[3])
                continue
            m = re.match(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", st)
            if m:
                self.add_shared(int(m[1] or 8), m[3], WIDTH[m[2]] // 8 * int(m[4] or 1))
                continue
            m = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", st)
            if m:  # a call's argument: kept in local memory
                size = _align(WIDTH[m[1]] // 8 * int(m[3] or 1), 8)
                new = f"{prefix}p{fresh}{m[2]}"
                fresh += 1
                scopes[-1][m[2]] = new
                self.local_bytes = _align(self.local_bytes, 16)
                self.local[new] = self.local_bytes
                self.local_bytes += size
                continue
            m = re.match(r"\.branchtargets\s+(.*)", st)
            if m:
                self.tables[pending_label] = [label_scope.get(t.strip(), t.strip()) for t in m[1].split(",")]
                continue
            raise NotImplementedError(st)
        if prefix:
            self.labels[leave] = self.start_block()

    def instruction(self, st: str, original: str, leave: str, prefix: str) -> None:
        m = _INSTRUCTION.match(st)
        if not m:
            raise NotImplementedError(original)
        negated, guard, op, rest = m[1] == "!", m[2] or "", _parts(m[3]), tuple(split_operands(m[4]))
        i = Instruction(op, rest, original, guard, negated, self.line)
        if op[0] == "call":
            return self.call(i, prefix)
        if op[0] == "ret" and leave:
            i = Instruction(["bra"], (leave,), original, guard, negated)
        waits = op[0] in ("bar", "barrier") and "warp" not in op and "arrive" not in op and op[1] != "cluster"
        if is_warp_sync(i) or (self.sleeps and is_arrival(i)):
            self.start_block()
        if i.op[0] in _ENDS or waits or i.op[0] == "nanosleep":
            self.blocks[-1].end = i
            self.blocks.append(Block())
        else:
            self.blocks[-1].body.append(i)

    def call(self, i: Instruction, prefix: str) -> None:
        """Inlines the function; recursion is refused."""
        parts = list(i.operands)
        results = parts.pop(0).strip("() ").split(",") if parts[0].startswith("(") else []
        name = parts.pop(0)
        arguments = [a.strip() for a in parts[0].strip("() ").split(",")] if parts else []
        at = re.search(rf"\.func\s*(?:\.noreturn\s*)?(\([^)]*\))?\s*{re.escape(name)}\s*(\([^)]*\))?\s*(?:\.\w+\s*)*\{{", self.text)
        if not at or i.guard:
            raise NotImplementedError(f"call of {name}: {i.text}")
        if self.depth > 8:
            raise NotImplementedError(f"recursion in {name}")
        formal = list(_parameters((at[2] or "()")[1:-1])) if (at[2] or "()")[1:-1].strip() else []
        returns = list(_parameters((at[1] or "()")[1:-1])) if (at[1] or "()")[1:-1].strip() else []
        names = dict(zip([*formal, *returns], [*arguments, *[r.strip() for r in results]], strict=True))
        self.inlined += 1
        self.depth += 1
        self.build(_braced(self.text, at.end() - 1), f"{prefix}f{self.inlined}_", names)
        self.depth -= 1


class Module:
    """A file of PTX: its entry points are parsed when asked for."""

    def __init__(self, text: str):
        self.text = _uncomment(text)
        self._at = {m[1]: m.start() for m in re.finditer(r"\.entry\s+([\w$]+)", self.text)}
        self.names = list(self._at)
        # Variables of the module stand before, between and after its functions; initial values may hold braces.
        outside = re.sub(r"\.(?:visible\s+|weak\s+)?(?:entry|func)\b", "\0", self.text)
        pieces, depth, keep = [], 0, True
        for piece in re.split(r"(\0\{|[{}])", re.sub(r"\0[^;{]*\{", "\0{", outside)):
            if piece == "\0{" or (piece == "{" and not keep):
                depth, keep = depth + 1, False
            elif piece == "}" and not keep:
                depth -= 1
                keep = depth == 0
            elif keep:
                pieces.append(piece)
        self.variables = re.sub(r"\.section\s+[.\w]+\s*\{[^}]*\}", "", "".join(pieces))

    def program(self, name: str | None = None) -> Program:
        """The entry point called `name` (or holding it; the first one without it)."""
        chosen = name if name in self._at else next((n for n in self.names if name is None or name in n), None)
        if chosen is None:
            raise PtxError(f"no entry point {name!r}; there are {self.names}")
        text, at = self.text, self._at[chosen]
        body_start = text.index("{", at)
        m = re.compile(r"\(([^)]*)\)").search(text, at, body_start)
        head, directives = (m[1], text[m.end() : body_start]) if m else ("", text[at:body_start])
        build = _Builder(text)
        for m in re.finditer(r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;", self.variables):
            if not m[1]:
                build.add_shared(int(m[2] or 8), m[4], WIDTH[m[3]] // 8 * int(m[5] or 1))
        constants = {m[4]: _initial(m[3], int(m[5] or 1), m[6] or m[7] or "") for m in _VARIABLE.finditer(self.variables)}
        body = _braced(text, body_start)
        build.build(body, "")
        build.shared_bytes = _align(build.shared_bytes, 16)
        for m in re.finditer(r"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)\s*\[", self.variables):
            build.shared[m[1]] = build.shared_bytes  # dynamic shared memory lies behind the static
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+(?:\s*,\s*\d+)*)", directives)
        count = None
        if threads:
            count = 1
            for n in threads[1].split(","):
                count *= int(n)
        return Program(
            chosen, _parameters(head) if head.strip() else {}, build.blocks, build.labels, build.tables, build.registers, build.widths,
            build.shared, build.shared_bytes, build.local, build.local_bytes, constants, count, body,
        )  # fmt: skip
