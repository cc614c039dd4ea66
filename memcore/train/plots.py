"""Figures of training runs: learning curves, memory traces, accuracy by instance. matplotlib is imported at first use."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from .checkpoint import atomic_write, load_checkpoint
from .experiment import RESULT, load_run
from .loop import CHECKPOINT, CURVE, evaluate

__all__ = ["accuracy", "curve", "memory", "memory_figure", "png"]

PathLike = str | os.PathLike[str]
LABELS = {
    "sequences": "sequences",
    "step": "updates",
    "seconds": "seconds of training",
    "loss": "training loss",
    "eval_loss": "validation loss",
    "bits": "bits per sequence",
    "wrong_bits": "wrong bits (rate)",
}


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", extra="train").Figure(figsize=(width, height), layout="constrained")


def png(figure: Any, kind: str = "png") -> bytes:
    """The figure as the bytes of an image file.

    Raises:
        ValueError: matplotlib knows no such kind of file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()


def _save(figure: Any, out: PathLike | None) -> Any:
    if out is not None:
        path = Path(out)
        data = png(figure, path.suffix.lstrip(".") or "png")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    return figure


def _rows(folder: PathLike) -> list[dict[str, Any]]:
    path = Path(folder) / CURVE
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"memcore.plots: 'runs' must be folders with a readable {CURVE}, got {str(folder)!r} ({e})") from e
    if not rows:
        raise ValueError(f"memcore.plots: 'runs' must hold at least one row of {CURVE}, got none in {str(folder)!r}")
    return rows


def _columns(row: Mapping[str, Any]) -> dict[str, float]:
    """The row with its lists spread: accuracy.1, accuracy.2, ..."""
    spread: dict[str, float] = {}
    for key, value in row.items():
        spread.update({f"{key}.{i}": v for i, v in enumerate(value, 1)} if isinstance(value, list) else {key: value})
    return spread


def _config(folder: PathLike) -> dict[str, Any]:
    """The run's configuration, from its result where the weights were not kept."""
    result = Path(folder) / RESULT
    if not (Path(folder) / CHECKPOINT).exists() and result.exists():
        return json.loads(result.read_text())["config"]
    return load_checkpoint(Path(folder) / CHECKPOINT).meta["user"]


def _names(folders: Sequence[PathLike]) -> list[tuple[str, str]]:
    """(task, label of the arm) of each run; runs that differ in the seed alone share both."""
    configs = [_config(f) for f in folders]
    told = []
    for c in configs:
        same = {**c, "train": {k: v for k, v in c["train"].items() if k not in ("seed", "steps")}}
        told.append((c["task"], c["model"], json.dumps(same, sort_keys=True)))
    by_model: dict[tuple[str, str], list[str]] = {}
    for task, model, full in told:
        variants = by_model.setdefault((task, model), [])
        if full not in variants:
            variants.append(full)
    names = []
    for task, model, full in told:
        variants = by_model[task, model]
        names.append((task, model.upper() if len(variants) == 1 else f"{model.upper()} ({variants.index(full) + 1})"))
    return names


def curve(
    runs: Sequence[PathLike], out: PathLike | None = None, *, metric: str = "eval_loss", x: str = "sequences", log: bool = False
) -> Any:
    """Learning curves: runs that differ in the seed alone are drawn as their median and a band from the least to the greatest.

    A run that ended early keeps its last value.

    Args:
        runs: folders written by `memcore train`.
        out: image to write; None only returns the figure.
        metric: column of the learning curve; `name.k` is the kth entry of one that holds lists.
        x: "sequences", "step" or "seconds".
        log: logarithmic vertical axis.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: a folder holds no run, or the runs do not have the column.
    """
    names = _names(runs)
    groups: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    unit = ""
    for folder, name in zip(runs, names, strict=True):
        rows = _rows(folder)
        if "returns" in rows[0]:
            raise ValueError(f"memcore.plots.curve: 'runs' must be of tasks, got an agent's in {str(folder)!r}; memcore plot returns draws it")
        rows = [_columns(row) for row in rows]
        if metric not in rows[0]:
            raise ValueError(f"memcore.plots.curve: 'metric' must be one of {', '.join(rows[0])}, got {metric!r}")
        if metric.endswith("loss"):
            unit = next((f", {u} per sequence" for u in ("bits", "nats") if u in rows[0]), "")
        groups.setdefault(name, []).append(tuple(np.array([r[k] for r in rows], dtype=float) for k in (x, metric)))
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    tasks = {task for task, _ in groups}
    for (task, arm), series in groups.items():
        at = np.unique(np.concatenate([xs for xs, _ in series]))
        at = at[at >= max(xs[0] for xs, _ in series)]
        values = np.stack([np.interp(at, xs, ys) for xs, ys in series])
        label = arm if len(tasks) == 1 else f"{task}, {arm}"
        if len(series) > 1:
            label += f" (median of {len(series)} seeds, band: all)"
        (line,) = axes.plot(at, np.median(values, 0), label=label, linewidth=1.6)
        if len(series) > 1:
            axes.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    drawn = np.concatenate([ys for series in groups.values() for _, ys in series])
    if log and drawn.min() <= 0:  # zeros sit on the axis
        axes.set_yscale("symlog", linthresh=drawn[drawn > 0].min(initial=1.0))
        axes.set_ylim(bottom=0)
    elif log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlim(left=0)
    axes.set_xlabel(LABELS.get(x, x))
    axes.set_ylabel(LABELS.get(metric, metric) + unit)
    axes.set_title(", ".join(sorted(tasks)))
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, out)


def _used(weights: np.ndarray) -> np.ndarray:
    """The slots, of weights [.., N], that ever get a tenth of the attention, with a margin, as one stretch of the ring.

    All of them if the focus is never sharp.
    """
    n = weights.shape[-1]
    busy = np.flatnonzero(weights.reshape(-1, n).max(0) > 0.1)
    if not len(busy):
        return np.arange(n)
    gaps = np.diff(np.append(busy, busy[0] + n))
    last = len(gaps) - 1 - gaps[::-1].argmax()  # the stretch ends before the widest gap
    first, count = busy[(last + 1) % len(busy)], n - gaps[last] + 1
    margin = min(2, (n - count) // 2)
    return (first - margin + np.arange(count + 2 * margin)) % n


def _image(axes: Any, data: np.ndarray, title: str, label: str, slots: np.ndarray | None = None, **how: Any) -> None:
    """[T, rows] with time to the right; `slots` names the rows."""
    ticker = require("matplotlib.ticker", extra="train")
    axes.imshow(data.T, aspect="auto", interpolation="nearest", **how)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    if slots is not None:
        _name_ticks(axes.yaxis, slots)


def _name_ticks(axis: Any, slots: np.ndarray) -> None:
    ticker = require("matplotlib.ticker", extra="train")
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: str(slots[int(v)]) if 0 <= v < len(slots) else ""))


def _stack(x: np.ndarray) -> np.ndarray:
    """[T, H, n] -> [T, H n + H - 1]: the heads above each other, a blank row between them."""
    blank = np.full((x.shape[0], 1), np.nan)
    parts = [p for h in range(x.shape[1]) for p in (x[:, h], blank)]
    return np.concatenate(parts[:-1], axis=1)


@torch.no_grad()
def memory_figure(model: Any, task: Any, batch: Any) -> Any:
    """What a model does with the first sequence of a batch, as in figure 6 of the NTM paper and figure 2 of Collier and Beel.

    Inputs, target and output; add vectors and read vectors; write and read weightings over time (the slots in use); the memory
    at the end.

    Raises:
        ValueError: the model has no `trace`.
    """
    if not hasattr(model, "trace"):
        raise ValueError(f"memcore.plots.memory: the model must be an NTM or MANN, got {type(model).__name__}, which has no memory")
    length = batch.input.shape[0] if batch.lengths is None else int(batch.lengths[0])
    trace = {k: v[:length, 0].float().cpu().numpy() for k, v in model.trace(batch.input).items()}
    output, _ = model(batch.input, lengths=batch.lengths)
    mask = batch.mask[:length, 0].bool()
    bits = batch.target.is_floating_point()
    answer = output[:length, 0].sigmoid() if bits else output[:length, 0].softmax(-1)
    answer = answer.masked_fill(~mask[:, None], float("nan"))
    target: Tensor = batch.target[:length, 0].float()
    target = (target if target.dim() > 1 else target[:, None]).masked_fill(~mask[:, None], float("nan"))

    figure = _figure(11, 9.5)
    grid = figure.add_gridspec(4, 2, height_ratios=(1.5, 1.2, 2.2, 1.2))
    grey = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    _image(figure.add_subplot(grid[0, 0]), batch.input[:length, 0].numpy(), "inputs", "channel", cmap="gray_r")
    halves = grid[0, 1].subgridspec(2, 1, hspace=0.1)
    above, below = figure.add_subplot(halves[0]), figure.add_subplot(halves[1])
    _image(above, target.numpy(), "target (above), output (below)", "target", **(grey if bits else {}))
    above.tick_params(labelbottom=False)
    _image(below, answer.numpy(), "", "output", **grey)
    for column, key, title in ((0, "add", "add vectors"), (1, "reads", "read vectors")):
        if key in trace:
            _image(figure.add_subplot(grid[1, column]), _stack(trace[key]), title, "component", cmap="viridis")
    used = _used(np.concatenate([trace["write_weights"], trace["read_weights"]], axis=1))
    for column, key, title in ((0, "write_weights", "write weightings"), (1, "read_weights", "read weightings")):
        heads = trace[key].shape[1]
        axes = figure.add_subplot(grid[2, column])
        label = "slot" if heads == 1 else f"slots in use, {heads} heads"
        _image(axes, _stack(trace[key][:, :, used]), title, label, used if heads == 1 else None, cmap="magma", vmin=0, vmax=1)
        axes.set_xlabel("time step", fontsize=8)
    axes = figure.add_subplot(grid[3, :])
    _image(axes, trace["memory"][-1][used], "memory at the end (slots in use)", "component", cmap="viridis")
    _name_ticks(axes.xaxis, used)
    axes.set_xlabel("slot", fontsize=8)
    return figure


def memory(
    run: PathLike, out: PathLike | None = None, *, overrides: Mapping[str, Any] | None = None, seed: int = 0, data: PathLike | None = None
) -> Any:
    """`memory_figure` of a trained run on one fresh sequence.

    Args:
        run: folder or checkpoint of an NTM or MANN.
        out: image to write; None only returns the figure.
        overrides: of `task.sample`, e.g. {"length": 20}.
        seed: of the sequence.
        data: folder of the data sets.
    """
    model, task, _ = load_run(run, data=data)
    batch = task.sample(1, generator=torch.Generator().manual_seed(seed), **(overrides or {}))
    return _save(memory_figure(model, task, batch), out)


def accuracy(runs: Sequence[PathLike], out: PathLike | None = None, *, sequences: int = 1000, data: PathLike | None = None) -> Any:
    """Accuracy of Omniglot runs by how many times a class was seen, on test characters: median and band over seeds.

    Raises:
        ValueError: a run is not of the omniglot task.
    """
    groups: dict[str, list[list[float]]] = {}
    for folder, (name, arm) in zip(runs, _names(runs), strict=True):
        if name != "omniglot":
            raise ValueError(f"memcore.plots.accuracy: 'runs' must be of task omniglot, got {name} in {str(folder)!r}")
        model, task, _ = load_run(folder, data=data)
        scores = next(iter(evaluate(model, task, sequences=sequences).values()))
        groups.setdefault(arm, []).append(scores["accuracy"])
    figure = _figure(6.5, 4.2)
    axes = figure.subplots()
    for arm, found in groups.items():
        values = 100 * np.array(found)
        at = np.arange(1, values.shape[1] + 1)
        label = arm if len(found) == 1 else f"{arm} (median of {len(found)} seeds, band: all)"
        (line,) = axes.plot(at, np.median(values, 0), marker="o", label=label)
        if len(found) > 1:
            axes.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(100 * task.chance, color="grey", linestyle=":", linewidth=1, label="chance")
    axes.plot([1], [100 * task.first_instance_ceiling], "_", color="grey", markersize=14, label="most without a leak")
    axes.set_ylim(0, 100)
    axes.set_xticks(at)
    axes.set_xlabel("instance of the class in the episode")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"omniglot, {sequences:,} test episodes")
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, out)
