"""Mutants of the CUDA source, all in one build: every barrier, wait, shuffle mask, loop bound and thread mask of csrc/cuda gets a mark by which a
driver can leave it out (shim_mutant.h).

    barrier   __syncthreads, __syncwarp, a team's sync, the wait for copies and their commit, a block's arrival and its wait for others are passed over
    mask      a shuffle's full mask loses half its lanes
    loop      `i < n` goes one further
    guard     a bound or a choice of threads in `if`, `?:` and `bool on =` lets everyone pass
"""

import re
from dataclasses import dataclass
from pathlib import Path

import shim_build

__all__ = ["Mutant", "marked_sources"]

_BARRIER = re.compile(
    r"(?<!void )(?<![\w:.])(?:__syncthreads\(\)|__syncwarp\(\)|staged\(\)|(?:b\.)?team\.sync\(\)|__pipeline_wait_prior\(0\)|__pipeline_commit\(\)|mc_arrive\([^;]*\)|mc_await\([^;]*\))(?=;)"
)
_VOTE = re.compile(r"__syncthreads_or\((\w+)\)")
_MASK = re.compile(r"(?<=_sync\()kFull")
_COMPARED = re.compile(r"^[\w.()& +]*(?<![<>]) (?:<|>=|>) [^<>]+$")
_CHOSEN = re.compile(r"^(?:[\w.]*\b(?:lane|rank)|\(threadIdx\.x & 31\)) == 0$")
_TERNARY = re.compile(r"(?<=[=(&] )(?:h < [\w.]+|on|b\.count|count)(?= \?| && \w+ \?)|(?<=\()(?:h < [\w.]+|on|b\.count|count)(?= \?)")
_BOOL = re.compile(r"const bool on = ([^;]+);")
_HALF = "  return f(__half());\n"


@dataclass(frozen=True)
class Mutant:
    number: int
    kind: str
    file: str
    line: int
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.text}"


def _closing(text: str, at: int) -> int:
    """Index of the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"'(' at {at} is not closed")


def _terms(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The operands of && and || at the top level of text[start:end]."""
    depth, cut, i, found = 0, start, start, []
    while i < end:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(text[i], 0)
        if depth == 0 and text[i : i + 2] in ("&&", "||"):
            found.append((cut, i))
            i += 1
            cut = i + 1
        i += 1
    found.append((cut, end))
    trim = lambda a, b: (a + len(text[a:b]) - len(text[a:b].lstrip()), b - len(text[a:b]) + len(text[a:b].rstrip()))
    return [trim(a, b) for a, b in found]


def _sites(text: str):
    """(kind, start, end, what takes the place of text[start:end], with {k} for the mark)"""
    bare = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)
    for m in _BARRIER.finditer(bare):
        yield "barrier", *m.span(), f"(mcshim::mutant({{k}}) ? (void)0 : (void){m[0]})"
    for m in _VOTE.finditer(bare):
        yield "barrier", *m.span(), f"(mcshim::mutant({{k}}) ? (int){m[1]} : {m[0]})"
    for m in _MASK.finditer(bare):
        yield "mask", *m.span(), "(kFull >> 16 * mcshim::mutant({k}))"
    for m in re.finditer(r"\bfor \(", bare):
        close = _closing(bare, m.end() - 1)
        parts = bare[m.end() : close].split(";")
        start = m.end() + len(parts[0]) + 1
        for a, b in _terms(bare, start, start + len(parts[1])):
            if re.search(r" < ", bare[a:b]):
                yield "loop", a, b, f"{text[a:b]} + mcshim::mutant({{k}})"
    for m in re.finditer(r"\bif \(", bare):
        close = _closing(bare, m.end() - 1)
        leaves = re.match(r"\s*(continue|return);", bare[close + 1 :])
        for a, b in _terms(bare, m.end(), close):
            if _COMPARED.match(bare[a:b]) or _CHOSEN.match(bare[a:b]):
                yield "guard", a, b, (f"({text[a:b]} && !mcshim::mutant({{k}}))" if leaves else f"({text[a:b]} || mcshim::mutant({{k}}))")
    for m in _BOOL.finditer(bare):
        for a, b in _terms(bare, *m.span(1)):
            yield "guard", a, b, f"({text[a:b]} || mcshim::mutant({{k}}))"
    for m in _TERNARY.finditer(bare):
        yield "guard", *m.span(), f"({m[0]} || mcshim::mutant({{k}}))"


def marked_sources() -> tuple[Path, list[Mutant]]:
    """A copy of csrc/cuda in which every site has its mark, and the mutants by mark. With MC_NO_HALF it refuses float16: a third less to compile."""
    folder, found, made = shim_build.OUT / "marked" / "cuda", [], set()
    for source in sorted([*shim_build.CUDA.glob("*.h"), *shim_build.kernels(), shim_build.ROOT / "csrc" / "cpu" / "dtype.h"]):
        text = source.read_text()
        sites = [] if source.parent != shim_build.CUDA or source.name == "mc_device.h" or source.name.endswith("glue.h") else sorted(_sites(text), key=lambda s: s[1])
        out, at = [], 0
        for kind, start, end, instead in sites:
            line = text.count("\n", 0, start)
            found.append(Mutant(len(found) + 1, kind, source.name, line + 1, " ".join(text[start:end].split()), text.splitlines()[line].strip()))
            out += [text[at:start], instead.format(k=found[-1].number)]
            at = end
        if sites:
            out.insert(0, '#include "shim_mutant.h"\n#line 1\n')
        out.append(text[at:])
        if source.name == "block.h":
            before, after = "".join(out).split(_HALF)
            line = text[: text.index(_HALF)].count("\n") + 1
            out = [before, f'#ifdef MC_NO_HALF\n  throw std::invalid_argument("float16 is left out");\n#else\n{_HALF}#endif\n#line {line + 1}\n', after]
        to = folder.parent / source.parent.name / source.name
        to.parent.mkdir(parents=True, exist_ok=True)
        made.add(to)
        if not to.exists() or to.read_text() != "".join(out):
            to.write_text("".join(out))
    for old in set(folder.iterdir()) - made:
        old.unlink()
    return folder, found
