"""Figures of the newest rows in `rows.csv`, of nothing else."""

import re
from pathlib import Path
from typing import Any

from .._extras import require
from . import rows as _rows

__all__ = ["draw"]

_SIZES = ("(16,1,128,20)", "(64,4,512,64)", "(32,4,4096,64)")


def _eager_gate(row: dict[str, Any]) -> float | None:
    """The factor in "6x eager, 3x compile"."""
    for part in (row["gate"] or "").split(", "):
        if part.endswith("x eager"):
            return float(part.removesuffix("x eager"))
    return None


def _bars(axis: Any, labels: list[str], series: dict[str, list[float | None]], gates: list[float | None], title: str) -> None:
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [y + (i - (len(series) - 1) / 2) * height for y in range(len(labels))]
        axis.barh(at, [v or 0 for v in values], height, label=name)
    for y, gate in enumerate(gates):
        if gate is not None:
            axis.plot([gate, gate], [y - 0.42, y + 0.42], color="black", linewidth=1.5, label="gate")
    axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as tuned eager PyTorch")
    axis.set_title(title, fontsize=10)
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=8)


def _ratios(found: list[dict[str, Any]], label: str) -> tuple[list[str], dict[str, list[float | None]], list[float | None]]:
    """Bars of memcore and compile against eager, one a measurement at one thread."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(label.format(**row), {})[row["variant"]] = row
    groups = {name: group for name, group in groups.items() if "memcore" in group}
    series = {v: [g[v]["ratio_vs_eager"] if v in g else None for g in groups.values()] for v in ("memcore", "compile")}
    series = {v: values for v, values in series.items() if any(values)}
    return list(groups), series, [_eager_gate(g["memcore"]) for g in groups.values()]


_NAMES = {"B": "batch", "N": "slots", "W": "slot width", "T": "time steps"}
_SHAPE = re.compile(r"\((?P<B>\d+),\d+/\d+,(?P<N>\d+),(?P<W>\d+)\) T=(?P<T>\d+)")


def _lines_of(found: list[dict[str, Any]], pyplot: Any, save: Any) -> None:
    """Time of a step against each size, and the bytes kept for the backward against T."""
    figure, axes = pyplot.subplots(1, 5, figsize=(20, 4))
    for axis, (letter, name) in zip(axes, [*_NAMES.items(), ("T", "time steps")], strict=True):
        last = axis is axes[-1]
        column = "saved_bytes" if last else "ms_median"
        for variant in ("memcore", "eager", "compile"):
            rows = [r for r in found if r["variant"] == variant and r["pass"].endswith(f"over {letter}") and r[column] is not None]
            points = sorted((int(_SHAPE.match(r["shape"])[letter]), r[column] / (2**20 if last else 1)) for r in rows)
            if points and not (last and variant == "compile"):
                axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_ylabel("kept for the backward, MiB\n(without the controller's)" if last else "forward + backward, ms a step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, "sequence", "scaling")


def draw(folder: str | Path) -> list[Path]:
    """Draw what the rows in `folder` allow: ops.png, step.png, sequence.png; returns the paths."""
    found = [r for r in _rows.newest(_rows.read(folder)) if r["threads"] == 1 and r["dtype"] == "float32"]
    matplotlib = require("matplotlib", extra="train")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []

    def save(figure: Any, name: str, *suites: str) -> None:
        last = [r for r in found if r["suite"] in suites][-1]
        note = f"{last['cpu']}, one thread, torch {last['torch']}, memcore {last['commit']}, {last['date']}"
        figure.text(0.01, 0.002, note, fontsize=6)
        figure.tight_layout(rect=(0, 0.015, 1, 1))
        path = Path(folder) / f"{name}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)

    single = [r for r in found if r["suite"] == "ops"]
    sizes = [s for s in _SIZES if any(r["shape"] == s for r in single)]
    if sizes:
        figure, axes = pyplot.subplots(2, len(sizes), figsize=(4.6 * len(sizes), 9), squeeze=False)
        for i, kind in enumerate(("fwd", "fwd+bwd")):
            for j, size in enumerate(sizes):
                labels, series, gates = _ratios([r for r in single if r["shape"] == size and r["pass"] == kind], "{op}")
                if series:
                    _bars(axes[i][j], labels, series, gates, f"{size}, {kind}")
        save(figure, "ops", "ops")

    parts = [
        (_ratios([r for r in found if r["suite"] == "step"], "{shape}"), "ntm_step chained, forward + backward"),
        (_ratios([r for r in found if r["suite"] == "sequence"], "{op} {shape}"), "a sequence, forward + backward"),
        (_ratios([r for r in found if r["suite"] == "train"], "{shape}"), "a whole training step"),
    ]
    parts = [(p, title) for p, title in parts if p[1]]
    if parts:
        figure, axes = pyplot.subplots(len(parts), 1, figsize=(8, 2.6 * len(parts)), squeeze=False)
        for (part, title), axis in zip(parts, axes[:, 0], strict=True):
            _bars(axis, [label.replace(" N=128 W=20 LSTM 100", "") for label in part[0]], *part[1:], title)
        save(figure, "step", "step", "sequence", "train")

    grown = [r for r in found if r["suite"] == "scaling"]
    if grown:
        _lines_of(grown, pyplot, save)
    return written
