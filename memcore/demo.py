"""`memcore demo`: train copy until it is solved, time the kernels, train a MANN if Omniglot is there, write one report page."""

import base64
import html
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import _backend, backend
from .train import build, configure, experiment, plots, run, update
from .train.checkpoint import atomic_write
from .train.loop import plain
from .train.optimizers import make_optimizer

__all__ = ["run_demo"]

SOLVED = 0.1  # bits per sequence
LENGTHS = ("20", "40", "80", "120")
ROUNDS = 9
MANN_MINUTES = 0.75
TEST_SEQUENCES = 100

Log = Callable[[str], None]


def _variants(model: Any, log: Log) -> dict[str, tuple[Any, str]]:
    """name -> (model, backend) of the same training step on different implementations."""
    from .bench import baselines

    native = _backend.describe()["native"]
    variants = {"memcore, native kernels" if native else "memcore, plain PyTorch": (model, "auto")}
    variants["eager PyTorch, tuned"] = (baselines.eager_ntm(model), "reference")
    log("compiling the eager step with torch.compile (up to a minute) ...")
    twin = baselines.eager_ntm(model)
    twin.cell.memory_step = torch.compile(baselines.eager_ntm_step, dynamic=False)
    variants["torch.compile of the step"] = (twin, "reference")
    return variants


def _time_steps(log: Log) -> dict[str, Any]:
    """Milliseconds of one whole training step on copy, 20 vectors, batch 16: the variants in turn, round after round."""
    config = configure("ntm", "copy")
    model, task = build(config)
    batch = task.sample(16, generator=torch.Generator().manual_seed(0), length=20)
    steps, notes = {}, []
    for name, (net, which) in _variants(model, log).items():
        optimizer = make_optimizer("adam", net.parameters(), 1e-4)

        def step(net: Any = net, which: str = which, optimizer: Any = optimizer) -> None:
            with backend(which):
                update(net, task, batch, optimizer, clip_norm=10.0)

        try:
            step()
            step()
        except Exception as e:  # whatever a missing C++ compiler provokes inside torch.compile
            if "compile" not in name:
                raise
            notes.append(f"{name}: not measured, {' '.join(str(e).split())[:160]}")
            continue
        steps[name] = step
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(values) for name, values in samples.items()}
    first = next(iter(ms.values()))
    rows = [{"variant": name, "ms": value, "times_memcore": value / first} for name, value in ms.items()]
    for row in rows:
        log(f"  {row['variant']:28} {row['ms']:8.1f} ms a training step ({row['times_memcore']:.1f}x)")
    return {"batch": 16, "time_steps": batch.input.shape[0], "threads": torch.get_num_threads(), "rows": rows, "notes": notes}


def _copy(out: Path, minutes: float, seed: int, log: Log) -> tuple[dict[str, Any], Any, Any]:
    config = configure("ntm", "copy", seed=seed)
    log(f"training an NTM on copy until a sequence costs less than {SOLVED} bits, at most {minutes:g} minutes ...")
    result, model, task = run(
        config, out, until=SOLVED, max_minutes=minutes, test_sequences=TEST_SEQUENCES, progress=True, log=log
    )
    for length in LENGTHS:
        test = result["test"][length]
        log(f"  {length:>3} vectors: {test['bits']:9.2f} bits a sequence, {100 * test['wrong_bits']:6.2f} % wrong bits")
    return result, model, task


def _mann(out: Path, seed: int, data: Any, log: Log) -> dict[str, Any] | None:
    """A MANN for less than a minute on short episodes of real drawings: 3 new characters, 5 drawings of each."""
    config = configure("mann", "omniglot", seed=seed, task_options={"classes": 3, "shots": 5}, eval_every=50)
    try:
        build(config, data=data)
    except (OSError, ValueError) as e:
        log(f"no MANN: {e}")
        return None
    log(f"training a MANN on Omniglot, 3 characters at a time, {60 * MANN_MINUTES:.0f} seconds ...")
    result, _, _ = run(config, out, max_minutes=MANN_MINUTES, test_sequences=5 * TEST_SEQUENCES, data=data, progress=True, log=log)
    shown = ", ".join(f"{100 * a:.0f} %" for a in result["test"]["test"]["accuracy"])
    log(f"  accuracy on unseen characters by instance: {shown} (chance 33 %)")
    return result


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(r, "td") for r in rows) + "</table>"


def _picture(draw: Callable[[], Any], log: Log) -> str:
    try:
        data = plots.png(draw())
    except ImportError as e:
        log(str(e))
        return f"<p class=note>No picture: {html.escape(str(e))}</p>"
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}img{max-width:100%}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.note{color:#666;font-size:.9rem}"""


def _page(report: dict[str, Any], pictures: dict[str, str]) -> str:
    copy, timing, mann = report["copy"], report["timing"], report["mann"]
    solved = copy["stopped"] == "until"
    tests = [
        [f"{length} vectors", f"{copy['test'][length]['bits']:.2f}", f"{100 * copy['test'][length]['wrong_bits']:.2f} %",
         f"{100 * copy['test'][length]['sequences_wrong']:.0f} %"]
        for length in LENGTHS
    ]  # fmt: skip
    speeds = [[r["variant"], f"{r['ms']:.1f}", f"{r['times_memcore']:.2f}x"] for r in timing["rows"]]
    v, b = report["versions"], report["backend"]
    where = f"native, {b['cpu_isa']}" if b["native"] else "plain PyTorch, " + b["native_missing"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>memcore demo</title><style>" + STYLE + "</style>",
        "<h1>memcore demo</h1>",
        f"<p>memcore {v['memcore']}, torch {v['torch']}, Python {v['python']}; kernels: {html.escape(where)}; "
        f"{timing['threads']} thread(s), {report['seconds']:.0f} s in all.</p>",
        "<h2>A Neural Turing Machine learns to copy</h2>",
        f"<p>{'Solved' if solved else 'Stopped by ' + copy['stopped']} after {copy['sequences']:,} sequences of 1 to 20 vectors, "
        f"{copy['updates']:,} updates, {copy['seconds']:.0f} s ({copy['parameters']:,} parameters, seed {copy['seed']}). "
        f"Tested on {copy['test_sequences']} fresh sequences of each length; it never saw more than 20 vectors:</p>",
        _table(["test", "bits per sequence", "wrong bits", "sequences with an error"], tests),
        pictures["curve"],
        "<p>What its memory does with one sequence:</p>",
        pictures["memory"],
        "<h2>The same training step, side by side</h2>",
        f"<p>Forward, backward and optimizer on one batch of {timing['batch']} sequences, {timing['time_steps']} time steps, "
        f"median of {ROUNDS} rounds taken in turn.</p>",
        _table(["implementation", "ms", "time against memcore"], speeds),
        "".join(f"<p class=note>{html.escape(n)}</p>" for n in timing["notes"]),
        "<h2>A MANN learns characters from one example</h2>",
    ]
    if mann is None:
        parts.append("<p class=note>Not run: Omniglot was not found. Get it with <code>memcore data get omniglot</code>.</p>")
    else:
        accuracies = [f"{100 * a:.1f} %" for a in mann["test"]["test"]["accuracy"]]
        parts += [
            f"<p>Episodes with three characters it has never seen, five drawings of each, labels new in every episode; "
            f"{mann['sequences']:,} training episodes in {mann['seconds']:.0f} s, {mann['test_sequences']} test episodes. "
            f"Chance is 33 %; without a leak the first instance cannot exceed 61 %. A minute is only the beginning: the full "
            f"setting is <code>memcore train mann</code>.</p>",
            _table(["instance", *map(str, range(1, len(accuracies) + 1))], [["accuracy", *accuracies]]),
        ]
    return "\n".join(parts) + "\n"


def run_demo(
    out: str | os.PathLike[str], *, minutes: float = 3.0, seed: int = 0, data: str | os.PathLike[str] | None = None, log: Log = print
) -> dict[str, Any]:
    """Run the demo; writes `index.html` and `report.json` into `out` and returns the report.

    Args:
        out: folder of the report; the runs are kept below it.
        minutes: at most so long for training copy.
        seed: of weights and data.
        data: folder of the data sets.
        log: called with each line of progress.
    """
    began = time.perf_counter()
    if not minutes > 0:
        raise ValueError(f"memcore.demo: 'minutes' must be > 0, got {minutes}")
    folder = Path(out)
    runs = folder / f"runs-{time.strftime('%Y%m%d-%H%M%S')}"
    log("timing one training step on memcore, tuned eager PyTorch and torch.compile ...")
    timing = _time_steps(log)
    copy, model, task = _copy(runs / "copy-ntm", minutes, seed, log)
    mann = _mann(runs / "omniglot-mann", seed, data, log)
    batch = task.sample(1, generator=torch.Generator().manual_seed(seed), length=20)
    pictures = {
        "curve": _picture(lambda: plots.curve([runs / "copy-ntm"], log=True), log),
        "memory": _picture(lambda: plots.memory_figure(model.eval(), task, batch), log),
    }
    report = plain(
        {
            "versions": experiment.versions(),
            "backend": _backend.describe(),
            "timing": timing,
            "copy": copy,
            "mann": mann,
            "seconds": time.perf_counter() - began,
        }
    )
    atomic_write(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    atomic_write(folder / "index.html", _page(report, pictures).encode())
    return report
