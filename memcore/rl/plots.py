"""Figures and comparisons of agents' runs. matplotlib is imported at first use."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..train.plots import PathLike, _config, _figure, _names, _rows, _save
from .agents import AGENTS
from .experiment import WINDOW

__all__ = ["compare", "returns"]

HELD = 5  # rows that a level must last to count as reached
EPISODES = 20  # a point of the curve is the mean over so many


def _curve_of(folder: PathLike) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Rows, each episode's return, each episode's last step."""
    rows = _rows(folder)
    if _config(folder)["model"] not in AGENTS or "returns" not in rows[0]:
        raise ValueError(f"memcore.plots.returns: 'runs' must be runs of `memcore train nec`, got another one in {str(folder)!r}")
    flat = [(r, e) for row in rows for r, e in zip(row["returns"], row["ends"], strict=True)]
    return rows, np.array([r for r, _ in flat], dtype=float), np.array([e for _, e in flat], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the last `EPISODES` values up to each one."""
    sums = np.cumsum(np.append(0.0, values))
    at = np.arange(1, len(values) + 1)
    first = np.maximum(at - EPISODES, 0)
    return (sums[at] - sums[first]) / (at - first)


def _scores(rows: list[dict[str, Any]], values: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps, score): of greedy episodes where the run played some, else of the training episodes."""
    if "eval_return" in rows[0]:
        return tuple(np.array([row[k] for row in rows], dtype=float) for k in ("step", "eval_return"))
    return ends, _smooth(values)


def compare(runs: Sequence[PathLike], *, level: float | None = None) -> list[dict[str, Any]]:
    """One row a run: seed, steps, mean return of episodes 51-100 and, of a DQN, of the episodes that ended in the same steps as these.

    Args:
        runs: folders written by `memcore train nec`; a DQN is set against the NEC of its environment and seed, if there is exactly one.
        level: adds `reached`, the first step from which the score was at least this in five rows one after the other (or to the end): greedy
            episodes where the run played some, else the mean of the last 20 training episodes.
    """
    curves = [_curve_of(folder) for folder in runs]
    configs = [_config(folder) for folder in runs]
    windows: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for config, (_, values, ends) in zip(configs, curves, strict=True):
        if config["model"] == "nec" and len(values) >= WINDOW[1]:
            windows.setdefault((config["task"], config["train"]["seed"]), []).append((ends[WINDOW[0] - 1], ends[WINDOW[1] - 1]))
    table = []
    for folder, config, (rows, values, ends) in zip(runs, configs, curves, strict=True):
        seed = config["train"]["seed"]
        row = {"run": str(folder), "task": config["task"], "model": config["model"], "seed": seed, "steps": rows[-1]["step"], "episodes": len(values)}
        own = values[WINDOW[0] : WINDOW[1]]
        row["return_51_100"] = float(own.mean()) if len(values) >= WINDOW[1] else None
        span = windows.get((config["task"], seed), [])
        row["return_at_equal_steps"] = None
        if len(span) == 1:
            inside = (ends > span[0][0]) & (ends <= span[0][1])
            row["return_at_equal_steps"] = float(values[inside].mean()) if inside.any() else None
        if level is not None:
            at, score = _scores(rows, values, ends)
            held = [i for i in range(len(score)) if (score[i : i + HELD] >= level).all()]
            row["reached"] = int(at[held[0]]) if held else None
        table.append(row)
    return table


def _band(axes: Any, series: list[tuple[np.ndarray, np.ndarray]], label: str, **how: Any) -> str:
    """The median of several curves, and a band from the least to the greatest; their colour."""
    at = np.unique(np.concatenate([xs for xs, _ in series]))
    at = at[(at >= max(xs[0] for xs, _ in series)) & (at <= min(xs[-1] for xs, _ in series))]
    values = np.stack([np.interp(at, xs, ys) for xs, ys in series])
    (line,) = axes.plot(at, np.median(values, 0), label=label, linewidth=1.5, **how)
    if len(series) > 1:
        axes.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    return line.get_color()


def returns(runs: Sequence[PathLike], out: PathLike | None = None, *, level: float | None = None) -> Any:
    """Return against steps of every agent, and below it what NEC's dictionaries hold and how far the neighbours are.

    Runs that differ in the seed alone are drawn as their median and a band from the least to the greatest.

    Args:
        runs: folders written by `memcore train nec`.
        out: image to write; None only returns the figure.
        level: a return to mark.

    Raises:
        ValueError: a folder holds no run of an agent, or one that ended no episode.
    """
    names = _names(runs)
    curves = [_curve_of(folder) for folder in runs]
    for folder, (_, values, _) in zip(runs, curves, strict=True):
        if not len(values):
            raise ValueError(f"memcore.plots.returns: 'runs' must have finished an episode, got none in {str(folder)!r}")
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, found in zip(names, curves, strict=True):
        groups.setdefault(name, []).append(found)
    tasks = {task for task, _ in groups}
    stores = {name: found for name, found in groups.items() if "memory" in found[0][0][0]}
    figure = _figure(7, 7.5 if stores else 4.2)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(2.4, 1, 1)) if stores else [figure.subplots()]

    def label(name: tuple[str, str], found: list[Any]) -> str:
        arm = name[1] if len(tasks) == 1 else f"{name[0]}, {name[1]}"
        return arm if len(found) == 1 else f"{arm} (median of {len(found)} seeds, band: all)"

    colours = {name: _band(panels[0], [_scores(*f) for f in found], label(name, found)) for name, found in groups.items()}
    greedy = all("eval_return" in found[0][0][0] for found in groups.values())
    panels[0].set_ylabel("return, greedy" if greedy else f"return, mean of {EPISODES} episodes")
    panels[0].set_title(", ".join(sorted(tasks)))
    if level is not None:
        panels[0].axhline(level, color="grey", linestyle=":", linewidth=1)
    for name, found in stores.items():
        rows = [[r for r in f[0] if r["nearest"] is not None] for f in found]
        entries = [(np.array([r["step"] for r in rs]), np.array([sum(r["memory"]) for r in rs])) for rs in rows]
        _band(panels[1], entries, label(name, found), color=colours[name])
        for key, style in (("nearest", "-"), ("furthest", "--")):
            series = [(np.array([r["step"] for r in rs]), np.array([r[key] for r in rs])) for rs in rows]
            _band(panels[2], series, f"{name[1]}, {key}", linestyle=style, color=colours[name])
    if stores:
        panels[1].set_ylabel("entries, all actions")
        panels[2].set_ylabel("neighbours' |h - h'|$^2$")
        panels[2].set_yscale("symlog", linthresh=1e-4)
        panels[2].legend(fontsize=8)
        for panel in panels[1:]:
            panel.set_ylim(bottom=0)
    panels[0].legend()
    panels[-1].set_xlabel("steps of the environment")
    for panel in panels:
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    return _save(figure, out)
