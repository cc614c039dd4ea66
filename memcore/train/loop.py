"""The training loop shared by all systems: seeded, resumable to the bit, interruptible, stopped by a NaN."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_checkpoint, save_checkpoint
from .optimizers import OPTIMIZERS, make_optimizer
from .progress import Progress

__all__ = ["Diverged", "Interrupted", "RunResult", "check_settings", "evaluate", "train", "update"]

CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.jsonl"
SCHEDULES = ("constant", "cosine")
KEEPS = ("last", "best")
SAVE_SECONDS = 60.0
VALIDATION_SEED = 20141020  # one stream for every run, whatever its seed: arms and seeds are compared on the same sequences
VALIDATION_BATCHES = 16  # a batch shares one length
TEST_SEED = 20160619


class Diverged(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; the state was saved first."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass
class RunResult:
    """What a training run did. `loss` is the mean of the last curve row, in the task's unit; `kept` the update whose weights the model has."""

    updates: int
    sequences: int
    seconds: float
    loss: float
    stopped: str
    kept: int
    curve: list[dict[str, Any]] = field(default_factory=list, repr=False)
    checkpoint: Path | None = None


def update(
    model: nn.Module,
    task: Any,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> tuple[float, float]:
    """One optimizer step on one batch; returns (loss, gradient norm before clipping).

    Neither the weights nor the optimizer change when either number is NaN or infinite.
    """
    optimizer.zero_grad(set_to_none=True)
    output, _ = model(batch.input, lengths=batch.lengths)
    loss = task.loss(output, batch)
    loss.backward()
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    value, size = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()  # one synchronisation, not two
    if math.isfinite(value) and math.isfinite(size):
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(params, clip_value)
        if clip_norm is not None and size > clip_norm:
            torch.nn.utils.clip_grads_with_norm_(params, clip_norm, norm)
        optimizer.step()
    return value, size


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Any,
    *,
    sequences: int = 100,
    batch_size: int = 100,
    seed: int = TEST_SEED,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Mean loss and metrics over fresh sequences, for each of the task's test settings.

    Args:
        model: called as `model(input, lengths=...)`; its training mode is kept.
        task: draws the sequences and scores them.
        sequences: how many per setting, >= 1.
        batch_size: how many at once.
        seed: of the test sequences; the same ones for every model by default.
        settings: name -> overrides of `task.sample`; default `task.test_settings`.

    Returns:
        name -> {"loss": ..., metric: ...}; a metric that is a list is averaged entry by entry.
    """
    if sequences < 1 or batch_size < 1:
        raise ValueError(
            f"memcore.evaluate: 'sequences' and 'batch_size' must be >= 1, got {sequences} and {batch_size}"
        )
    training = model.training
    model.eval()
    out: dict[str, dict[str, Any]] = {}
    try:
        for name, overrides in (task.test_settings if settings is None else settings).items():
            generator = torch.Generator().manual_seed(seed)
            total: dict[str, Any] = {}
            left = sequences
            while left:
                n = min(left, batch_size)
                batch = task.sample(n, generator=generator, **overrides).to(_device(model))
                output, _ = model(batch.input, lengths=batch.lengths)
                row = {"loss": task.loss(output, batch).item(), **task.metrics(output, batch)}
                for key, value in row.items():
                    share = torch.as_tensor(value, dtype=torch.float64) * (n / sequences)
                    total[key] = total[key] + share if key in total else share
                left -= n
            out[name] = {k: v.tolist() for k, v in total.items()}
    finally:
        model.train(training)
    return out


def plain(x: Any) -> Any:
    """`x` as JSON can hold it: a NaN or infinite number becomes None."""
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


class _Curve:
    """Rows of the learning curve, appended to a JSONL file as they come."""

    def __init__(self, path: Path | None, keep_until: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        if path.exists():  # rows after the checkpoint, or half a row from a crash, are made again
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break
                if row["step"] <= keep_until:
                    self.rows.append(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        row = plain(row)
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one kills as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    old: dict[int, Any] = {}

    def note(signum: int, frame: Any) -> None:
        caught.append(signum)
        signal.signal(signum, old[signum])

    for s in (signal.SIGINT, signal.SIGTERM):
        old[s] = signal.signal(s, note)
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of `train`, of those given, that is out of range."""
    for name in ("steps", "batch_size", "eval_every", "eval_sequences"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"memcore.train: '{name}' must be an integer >= 1, got {value!r}")
    for name in ("clip_norm", "clip_value", "max_minutes"):
        value = settings.get(name)
        if value is not None and not value > 0:
            raise ValueError(f"memcore.train: '{name}' must be > 0 or None, got {value!r}")
    lr = settings.get("lr", 1.0)
    if not 0 < lr < math.inf:
        raise ValueError(f"memcore.train: 'lr' must be > 0 and finite, got {lr!r}")
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("keep", KEEPS)):
        value = settings.get(name, known[0])
        if value not in known:
            raise ValueError(f"memcore.train: '{name}' must be one of {', '.join(known)}, got {value!r}")


def _same_run(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"memcore.train: '{name}' must be {saved.get(name)!r} to resume {str(path)!r} exactly, got {value!r}"
            )


def train(
    model: nn.Module,
    task: Any,
    *,
    steps: int,
    batch_size: int = 16,
    optimizer: str = "adam",
    lr: float = 1e-3,
    schedule: str = "constant",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    seed: int = 0,
    until: float | None = None,
    max_minutes: float | None = None,
    eval_every: int = 100,
    eval_sequences: int = 64,
    validation: Mapping[str, Any] | None = None,
    keep: str = "last",
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    meta: Mapping[str, Any] | None = None,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> RunResult:
    """Train `model` on fresh sequences of `task`.

    Every `eval_every` updates one row joins the learning curve: step, sequences, loss (mean of the training batches since the last
    row, in the task's unit), eval_loss and the task's metrics on a fixed validation stream, seconds.

    Args:
        model: called as `model(input, lengths=...)`, returns (output, state). Seed it (`torch.manual_seed`) before building it.
        task: `sample`, `loss`, `metrics` as in `memcore.tasks`.
        steps: updates in all, those before a resume included.
        optimizer: "adam" or "rmsprop" (Graves 2013, as in the NTM paper).
        schedule: "constant", or "cosine" from lr at the first update to 0 after the last.
        clip_norm, clip_value: bound of the gradient's norm, of each of its elements; None leaves it.
        seed: of the data stream.
        validation: overrides of `task.sample` for the validation stream; default: the training distribution.
        keep: the weights that the model ends with: the "last", or the "best", those of the row with the lowest eval_loss, the first of
            equals. The checkpoint holds both.
        until: stop once a row's loss and eval_loss are both at or below this.
        max_minutes: stop after so many minutes of training, those before a resume included.
        out: folder for `checkpoint.safetensors` and `curve.jsonl`; without it nothing is written.
        resume: continue from the checkpoint in `out`, bit for bit as if never stopped (same threads, same machine).
        meta: kept in the checkpoint, returned by `load_checkpoint(...).meta["user"]`.
        progress: draw a bar on stderr.
        callback: called with each row.

    Raises:
        ValueError: a setting is out of range, or differs from the run that is resumed.
        Diverged: the loss or a gradient is NaN or infinite; the last checkpoint is kept.
        Interrupted: SIGINT or SIGTERM (main thread only); a checkpoint was saved.
    """
    settings = {
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "schedule": schedule,
        "clip_norm": clip_norm,
        "clip_value": clip_value,
        "seed": seed,
        "eval_every": eval_every,
        "eval_sequences": eval_sequences,
        "validation": dict(validation or {}),
        "keep": keep,
    }
    check_settings({**settings, "steps": steps, "max_minutes": max_minutes})
    if schedule != "constant":
        settings["steps"] = steps
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise ValueError("memcore.train: 'out' must name the run's folder to resume it, got None")
    optim = make_optimizer(optimizer, model.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    step, seconds, sums = 0, 0.0, [0.0, 0]  # sums: loss and updates since the last row
    best: dict[str, torch.Tensor] | None = None
    lowest, kept_at = math.inf, 0
    path = None if folder is None else folder / CHECKPOINT
    if resume:
        loaded = load_checkpoint(path)
        saved = loaded.meta["train"]
        _same_run(saved["settings"], settings, path)
        loaded.restore(model, optim, generator)
        step, seconds, sums = saved["step"], saved["seconds"], saved["sums"]
        if loaded.best is not None:
            best, (lowest, kept_at) = loaded.best, saved["best"]
        if step > steps:
            raise ValueError(f"memcore.train: 'steps' must be at least the {step} updates done before, got {steps}")
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    curve = _Curve(None if folder is None else folder / CURVE, step)
    device = _device(model)
    began = time.perf_counter() - seconds
    stopped = "steps"

    def save() -> None:
        if path is not None:
            state = {"step": step, "seconds": time.perf_counter() - began, "sums": sums, "settings": settings}
            if best is not None:
                state["best"] = [lowest, kept_at]
            save_checkpoint(path, model, optim, generator, {"train": state, "user": dict(meta or {})}, best=best)

    def kept() -> str:
        if path is None or not path.exists():
            return "no checkpoint was written yet"
        return f"the last checkpoint is kept at {path}"

    model.train()
    saved_at = time.perf_counter()
    with _signals() as caught, Progress(steps, step, batch_size, progress) as bar:
        while step < steps:
            if schedule == "cosine":
                for group in optim.param_groups:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = task.sample(batch_size, generator=generator).to(device)
            loss, norm = update(model, task, batch, optim, clip_norm, clip_value)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "loss" if not math.isfinite(loss) else "gradient norm"
                raise Diverged(
                    f"memcore.train: the {what} became {loss if what == 'loss' else norm} at update {step + 1} "
                    f"(sequence {(step + 1) * batch_size}); {kept()}; a lower learning rate or a tighter clip may help"
                )
            step += 1
            sums = [sums[0] + loss, sums[1] + 1]
            bar.advance()
            late = max_minutes is not None and time.perf_counter() - began >= 60 * max_minutes
            if step % eval_every == 0 or step == steps or late:
                scores = evaluate(
                    model,
                    task,
                    sequences=eval_sequences,
                    batch_size=-(-eval_sequences // VALIDATION_BATCHES),
                    seed=VALIDATION_SEED,
                    settings={"": validation or {}},
                )[""]
                row = {
                    "step": step,
                    "sequences": step * batch_size,
                    "loss": sums[0] / sums[1],
                    "eval_loss": scores.pop("loss"),
                    **scores,
                    "seconds": round(time.perf_counter() - began, 3),
                }
                sums = [0.0, 0]
                curve.append(row)
                if keep == "best" and row["eval_loss"] < lowest:
                    lowest, kept_at = row["eval_loss"], step
                    best = {k: v.detach().clone() for k, v in model.state_dict().items()}
                bar.row(row)
                if callback is not None:
                    callback(row)
                if until is not None and row["loss"] <= until and row["eval_loss"] <= until:
                    stopped = "until"
                    break
                if time.perf_counter() - saved_at > SAVE_SECONDS:
                    save()
                    saved_at = time.perf_counter()
            if late:
                stopped = "max_minutes"
                break
            if caught:
                stopped = "interrupted"
                break
        save()
        seconds = time.perf_counter() - began
    if stopped == "interrupted":
        where = "nothing was saved (no output folder)" if path is None else f"saved to {path}"
        raise Interrupted(f"interrupted at update {step} of {steps}; {where}", caught[0])
    if best is not None:
        model.load_state_dict(best)
    loss = curve.rows[-1]["loss"] if curve.rows else math.nan
    return RunResult(step, step * batch_size, seconds, loss, stopped, step if best is None else kept_at, curve.rows, path)
