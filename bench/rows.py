"""Rows of measurements: written as CSV and JSON lines, read back, printed as tables."""

import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .measure import exponent

__all__ = ["FIELDS", "append", "default_folder", "markdown", "newest", "powers", "read", "text"]

FIELDS = (
    "commit", "date", "cpu", "cores", "torch", "backend", "isa", "device", "allocator", "threads", "clock",
    "suite", "op", "shape", "dtype", "pass", "variant", "rounds", "ms_median", "p20", "p80", "min", "max",
    "GB/s", "GFLOP/s", "least_bytes", "saved_bytes", "saved_memories", "aten_calls", "ratio_vs_eager", "ratio_vs_compile", "gate", "passed",
    "recall",
)  # fmt: skip
_INTS = {"cores", "threads", "rounds", "least_bytes", "saved_bytes", "aten_calls"}
_NUMBERS = {
    "ms_median", "p20", "p80", "min", "max", "GB/s", "GFLOP/s", "saved_memories", "ratio_vs_eager", "ratio_vs_compile", "recall",
}  # fmt: skip
_KEY = ("suite", "op", "shape", "dtype", "pass", "threads", "variant", "device")
CSV, JSONL = "rows.csv", "rows.jsonl"


def default_folder() -> Path:
    """`bench/results` of a checkout, else `bench-results` in the working folder."""
    here = Path(__file__).resolve().parent
    return here / "results" if (here.parent / "pyproject.toml").exists() else Path("bench-results")


def _plain(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def append(rows: Iterable[dict[str, Any]], folder: str | Path) -> Path:
    """Append to `rows.csv` and `rows.jsonl` in `folder`; returns the CSV's path. A CSV of an older version gets the columns that it lacks.

    Raises:
        ValueError: the CSV there has columns that this version does not know, or a row has.
    """
    rows = [{name: _plain(row.get(name)) for name in FIELDS} if not set(row) - set(FIELDS) else row for row in rows]
    for row in rows:
        if tuple(row) != FIELDS:
            raise ValueError(f"memcore bench: a row must have the columns {', '.join(FIELDS)}, got {', '.join(row)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CSV
    if path.exists():
        with path.open(newline="") as f:
            header = tuple(next(csv.reader(f), ()))
        if header != FIELDS:
            if not header or set(header) - set(FIELDS):
                raise ValueError(f"memcore bench: {str(path)!r} must have the columns of this version, got {', '.join(header) or 'nothing'}")
            partial = path.with_name(f"{CSV}.{os.getpid()}")
            _write(partial, read(folder), "w")
            partial.replace(path)
    _write(path, rows, "a")
    with (folder / JSONL).open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _write(path: Path, rows: Iterable[dict[str, Any]], mode: str) -> None:
    with path.open(mode, newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        if not f.tell():
            writer.writeheader()
        writer.writerows(rows)


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    if name in _INTS:
        return int(cell)
    if name in _NUMBERS:
        return float(cell)
    return cell == "True" if name == "passed" else cell


def read(folder: str | Path) -> list[dict[str, Any]]:
    """All rows of `rows.csv` in `folder`, oldest first, None in columns that it does not have yet; FileNotFoundError in words if there is none."""
    path = Path(folder) / CSV
    if not path.exists():
        raise FileNotFoundError(f"memcore bench: no measurements in {str(path)!r}; make them with: memcore bench ops step train")
    with path.open(newline="") as f:
        return [{**dict.fromkeys(FIELDS), **{name: _value(name, cell) for name, cell in row.items()}} for row in csv.DictReader(f)]


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each measurement."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        found.pop(key := tuple(row[k] for k in _KEY), None)
        found[key] = row
    return list(found.values())


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, Any]]]:
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in _KEY if k != "variant"), {})[row["variant"]] = row
    return groups


def _ms(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['ms_median']:.3g}"


def _times(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}x"


_HEADS = {
    "ops": "operator, (B,H,N,W)",
    "fresh": "malloc as it is, (B,H,N,W); `ntm_step` chained, (B,read/write heads,N,W)",
    "step": "`ntm_step` chained, (B,read/write heads,N,W)",
    "sequence": "a sequence (NTM: LSTM controller 100; MANN: 200), (B,read/write heads,N,W), a step",
    "scaling": "NTM over a sequence, LSTM controller 100, (B,read/write heads,N,W), a step",
    "train": "training step",
    "calls": "call",
    "growth": "`ntm_step` chained, (B,read/write heads,N,W), forward + backward",
    "held": "call",
    "store": "`memcore.DND`, one query",
    "approximate": "`memcore.DND`, exact, beside approximate indices of about the recall said, one query",
    "knn": "the K nearest keys",
}
_SEARCHES = {  # unit, variants
    "store": ("us", ("memcore", "eager", "faiss")),
    "approximate": ("us", ("memcore", "memcore, bf16 copy", "hnswlib", "usearch", "faiss IVF")),
    "knn": ("ms", ("memcore", "eager", "faiss", "sparse eager", "products", "reads")),
}
_CONTEXT = ("products", "reads")  # which nobody has to beat
_STEP_SHAPE = re.compile(r"\((?P<B>\d+),\d+/\d+,(?P<N>\d+),(?P<W>\d+)\) T=(?P<T>\d+)")


def powers(rows: Sequence[dict[str, Any]], axis: str) -> tuple[float, float]:
    """How time and saved bytes of one variant's chains grow with the size `axis`: as its power."""
    sizes = [int(_STEP_SHAPE.match(r["shape"])[axis]) for r in rows]
    return exponent(sizes, [r["ms_median"] for r in rows]), exponent(sizes, [r["saved_bytes"] for r in rows])


def _growth(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the growth table: a line for each size that was varied."""
    head = [_HEADS["growth"], "varied", "memcore, ms", "time grows as (eager)", "saved grows as (eager)",
            "saved, memories a step (eager)", "gate", "met"]  # fmt: skip
    lines = []
    rows = [r for r in rows if r["date"] == rows[-1]["date"]]  # one run: another may have had other sizes
    for kind in dict.fromkeys(r["pass"] for r in rows):
        axis = kind.rpartition(" ")[2]
        ordered = sorted((r for r in rows if r["pass"] == kind), key=lambda r: int(_STEP_SHAPE.match(r["shape"])[axis]))
        group = {v: [r for r in ordered if r["variant"] == v] for v in ("memcore", "eager")}
        if len(group["memcore"]) < 2:
            continue
        ours, last = group["memcore"], group["memcore"][-1]
        time, saved = (f"{axis}^{p:.2f}" for p in powers(ours, axis))
        kept = f"{last['saved_memories']:.2f}"
        if len(group["eager"]) > 1:
            theirs = powers(group["eager"], axis)
            time, saved = f"{time} ({axis}^{theirs[0]:.2f})", f"{saved} ({axis}^{theirs[1]:.2f})"
            kept += f" ({group['eager'][-1]['saved_memories']:.2f})"
        sizes = ", ".join(_STEP_SHAPE.match(r["shape"])[axis] for r in ours)
        lines.append([
            f"ntm_step {last['shape']}", f"{axis} = {sizes}", ", ".join(_ms(r) for r in ours), time, saved, kept,
            last["gate"] or "", "" if last["passed"] is None else "yes" if last["passed"] else "NO",
        ])  # fmt: skip
    return head, lines


_FACTOR = re.compile(r"([\d.]+)x eager")


def least_ms(group: dict[str, dict[str, Any]], roof: Sequence[dict[str, Any]]) -> float | None:
    """What no operator can do without (`measure.least`). Older rows tell bytes instead: once through the cache they fit with room to spare, or
    one call of aten, at what the machine's limits were when they were measured."""
    if "least" in group:
        return group["least"]["ms_median"]
    row = group.get("memcore") or next(iter(group.values()))
    if row["least_bytes"] is None:
        return None
    both = row["pass"] != "fwd"
    level = "L2" if row["least_bytes"] <= (8 << 20 if both else 4 << 20) else "L3"
    speed = [r["GB/s"] for r in roof if (r["pass"], r["threads"]) == (level, row["threads"])]
    call = [r["ms_median"] for r in roof if (r["op"], r["pass"]) == ("aten call", row["pass"])]
    return max(1e-6 * row["least_bytes"] / speed[-1], call[-1]) if speed and call else None


def _met(ours: dict[str, Any], eager: dict[str, Any] | None, least: float | None) -> str:
    if ours["passed"] is None:
        return ""
    factor = _FACTOR.search(ours["gate"] or "")
    if not ours["passed"] and least and eager and factor and eager["ms_median"] / float(factor[1]) < least:
        return "NO: below the least"
    return "yes" if ours["passed"] else "NO"


def _searches(rows: Sequence[dict[str, Any]], suite: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the tables of searches; columns of gates only where one is set."""
    unit, variants = _SEARCHES[suite]
    scale = {"ms": 1, "us": 1e3}[unit]
    names = [n for n in variants if any(r["variant"] == n for r in rows)]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        return f"{scale * row['ms_median']:.3g}" + ("" if row["recall"] is None else f" (recall {row['recall']:.2f})")

    head = [_HEADS[suite], "of", *(f"{n}, {unit}" for n in names), *(f"vs {n}" for n in names[1:] if n not in _CONTEXT), "gate", "met"]
    lines = []
    for group in _grouped(rows).values():
        ours = group["memcore"]
        lines.append([
            f"{ours['op']} {ours['shape']}", ours["pass"], *(cell(group.get(n)) for n in names),
            *(_times(group[n]["ms_median"] / ours["ms_median"]) if n in group else "" for n in names[1:] if n not in _CONTEXT),
            ours["gate"] or "", "" if ours["passed"] is None else "yes" if ours["passed"] else "NO",
        ])  # fmt: skip
    if not any(line[-2] for line in lines):
        head, lines = head[:-2], [line[:-2] for line in lines]
    return head, lines


def _lines(rows: Sequence[dict[str, Any]], suite: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one suite's table; columns nobody fills are left out."""
    if suite in _SEARCHES:
        return _searches([r for r in rows if r["suite"] == suite], suite)
    if suite == "growth":
        return _growth([r for r in rows if r["suite"] == suite])
    head = [_HEADS[suite], "pass", "threads", "memcore, ms", "eager, ms", "compile, ms", "vectorised, ms", "as commonly written, ms",
            "no memory work, ms", "products, ms", "least, ms", "vs eager", "vs compile", "vs vectorised", "saved, memories a step (eager)", "aten calls (eager)", "GB/s",
            "grown by, KiB", "gate", "met"]  # fmt: skip
    lines = []
    roof = [r for r in rows if r["suite"] == "roofline" and r["cpu"] == rows[-1]["cpu"]]
    for group in _grouped([r for r in rows if r["suite"] == suite]).values():
        ours = group.get("memcore") or next(iter(group.values()))
        theirs = group.get("eager")

        def pair(name: str, form: str) -> str:
            if ours[name] is None:
                return ""
            other = "" if theirs is None or theirs is ours or theirs[name] is None else f" ({theirs[name]:{form}})"
            return f"{ours[name]:{form}}{other}"

        dtype = "" if ours["dtype"] == "float32" else f" {ours['dtype']}"
        least = least_ms(group, roof)
        lines.append([
            f"{ours['op']} {ours['shape']}{dtype}", ours["pass"], str(ours["threads"]),
            _ms(group.get("memcore")), _ms(theirs), _ms(group.get("compile")), _ms(group.get("vectorised")), _ms(group.get("naive")), _ms(group.get("floor")), _ms(group.get("products")),
            "" if least is None else f"{least:.3g}", _times(ours["ratio_vs_eager"]) if "memcore" in group else "", _times(ours["ratio_vs_compile"]) if "memcore" in group else "",
            _times(group["vectorised"]["ms_median"] / ours["ms_median"]) if {"memcore", "vectorised"} <= group.keys() else "",
            pair("saved_memories", ".2f"), pair("aten_calls", ",") if suite == "train" else "",
            "" if ours["GB/s"] is None else f"{ours['GB/s']:.1f}",
            f"{ours['saved_bytes'] / 1024:.0f}" if suite == "held" else "",
            ours["gate"] or "", _met(ours, theirs, least),
        ])  # fmt: skip
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return [head[i] for i in used], [[line[i] for i in used] for line in lines]


def _stamp(rows: Sequence[dict[str, Any]]) -> str:
    def seen(name: str) -> str:
        return ", ".join(dict.fromkeys(str(r[name]) for r in rows if r[name] not in (None, "")))

    return (
        f"{seen('cpu')}, {rows[-1]['cores']} cores; torch {seen('torch')}; memcore {seen('commit')}, backend {seen('backend')} "
        f"{seen('isa')}; {seen('date')}. CPU time at one thread, wall time at two, medians of interleaved rounds; {seen('allocator')} "
        "for every variant."
    )


def _suites(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [s for s in _HEADS if any(r["suite"] == s for r in rows)]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The README's tables from the newest rows of each measurement."""
    rows = newest(rows)
    out = []
    for suite in _suites(rows):
        head, lines = _lines(rows, suite)
        out += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        out += ["| " + " | ".join(line) + " |" for line in lines]
        out += ["", _stamp([r for r in rows if r["suite"] == suite]), ""]
    roof = [r for r in rows if r["suite"] == "roofline"]
    if roof:
        count = sorted({r["threads"] for r in roof})
        out += ["| limit | " + " | ".join(f"{n} thread(s)" for n in count) + " |", "|" + " --- |" * (len(count) + 1)]
        for name in dict.fromkeys((r["op"], r["pass"]) for r in roof):
            by = {r["threads"]: r for r in roof if (r["op"], r["pass"]) == name}
            out.append(f"| {roof_label(by[min(by)])} | " + " | ".join(roof_value(by[n]) if n in by else "" for n in count) + " |")
        out += ["", _stamp(roof), ""]
    return "\n".join(out)


def roof_label(row: dict[str, Any]) -> str:
    return f"{row['op']}, {row['pass']} {row['shape']}".rstrip()


def roof_value(row: dict[str, Any]) -> str:
    if row["GB/s"] is not None:
        return f"{row['GB/s']:.1f} GB/s"
    return f"{row['GFLOP/s']:.0f} GFLOP/s" if row["GFLOP/s"] is not None else f"{1e3 * row['ms_median']:.2f} us"


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The same tables, aligned for a terminal, and how many gates are met."""
    out = []
    for suite in _suites(rows):
        head, lines = _lines(rows, suite)
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        for line in [head, *lines]:
            out.append("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip())
        out.append("")
    out += [f"{roof_label(r)}, {r['threads']} thread(s): {roof_value(r)}" for r in rows if r["suite"] == "roofline"]
    judged = [r for r in rows if r["passed"] is not None]
    if judged:
        out.append(f"gates met: {sum(r['passed'] for r in judged)} of {len(judged)}")
    return "\n".join(out)
