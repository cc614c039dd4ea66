"""One training run as a folder: checkpoint, learning curve, result. What the command line and the demo are made of."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _backend
from .checkpoint import CheckpointError, atomic_write, load_checkpoint
from .loop import CHECKPOINT, TEST_SEED, RunResult, check_settings, evaluate, plain, train
from .presets import MODELS, preset

__all__ = ["RESULT", "build", "configure", "load_run", "run", "split", "versions"]

RESULT = "result.json"


def versions() -> dict[str, str]:
    """Versions of Python, memcore, torch and numpy, and the machine's kind."""
    import numpy

    import memcore

    return {
        "python": platform.python_version(),
        "memcore": memcore.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def configure(
    model: str,
    task: str,
    *,
    name: str = "default",
    task_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    **train_options: Any,
) -> dict[str, Any]:
    """The whole configuration of a run: the preset `name` with overrides; plain data, saved with the run.

    Raises:
        ValueError: no such preset, task or model.
    """
    base = preset(name, task, model)
    return {
        "task": task,
        "task_options": {**base["task"], **(task_options or {})},
        "model": model,
        "model_options": {**base["model"], **(model_options or {})},
        "train": {"seed": 0, **base["train"], **train_options},
        "preset": name,
    }


def split(task: Any) -> str:
    """Where the task's sequences come from."""
    drawings = getattr(task, "drawings", None)
    return "generated" if drawings is None else drawings.split


def build(config: Mapping[str, Any], *, data: str | os.PathLike[str] | None = None, device: str = "cpu") -> tuple[nn.Module, Any]:
    """The model, seeded by the configuration, and the task it describes.

    Raises:
        ValueError, TypeError, FileNotFoundError: an option is unknown or out of range, or data is missing.
    """
    import memcore
    from memcore import tasks

    try:
        available = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        available = False
    if not available:
        raise ValueError(f"memcore.train: 'device' must be cpu or a GPU that torch sees, got {device!r}")
    options = dict(config["task_options"])
    if data is not None and config["task"] == "omniglot":
        options["root"] = data
    task = tasks.make(config["task"], **options)
    torch.manual_seed(config["train"]["seed"])
    cls = {"ntm": memcore.NTM, "mann": memcore.MANN, "lstm": memcore.LSTMBaseline}[config["model"]]
    return cls(task.input_size, task.output_size, **config["model_options"]).to(device), task


def run(
    config: Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    until: float | None = None,
    max_minutes: float | None = None,
    test_sequences: int = 100,
    data: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    progress: bool = False,
    callback: Any = None,
    log: Any = None,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """Train one configuration and test it; returns (result, model, task), and writes the result into `out`.

    Args:
        log: called with one line of text as the run goes on.
    """
    check_settings({**config["train"], "max_minutes": max_minutes})
    if test_sequences < 1:
        raise ValueError(f"memcore.train: 'test_sequences' must be >= 1, got {test_sequences}")
    model, task = build(config, data=data, device=device)
    with torch.no_grad():  # what cannot run at all fails before anything is written
        model(task.sample(1, generator=torch.Generator().manual_seed(0)).to(device).input)
    folder = None if out is None else _folder(Path(out), resume)
    say = log or (lambda text: None)
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{config['model']} on {config['task']}: {parameters:,} parameters, {config['train']['steps']:,} updates of "
        f"{config['train']['batch_size']}, seed {config['train']['seed']}, {torch.get_num_threads()} thread(s)"
        + ("" if folder is None else f", in {folder}")
    )
    done: RunResult = train(
        model,
        task,
        out=folder,
        resume=resume,
        until=until,
        max_minutes=max_minutes,
        meta=config,
        progress=progress,
        callback=callback,
        **config["train"],
    )
    result = plain(
        {
            "task": config["task"],
            "model": config["model"],
            "preset": config["preset"],
            "seed": config["train"]["seed"],
            "split": split(task),
            "updates": done.updates,
            "weights_of_update": done.kept,
            "sequences": done.sequences,
            "seconds": round(done.seconds, 2),
            "threads": torch.get_num_threads(),
            "device": device,
            "backend": _backend.describe(),
            "parameters": parameters,
            "stopped": done.stopped,
            "loss": done.loss,
            "optimum": task.optimum,
            "test_sequences": test_sequences,
            "test_seed": TEST_SEED,
            "test": evaluate(model, task, sequences=test_sequences),
            "config": config,
            "versions": versions(),
        }
    )
    if folder is not None:
        atomic_write(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result, model, task


def load_run(path: str | os.PathLike[str], *, data: str | os.PathLike[str] | None = None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The trained model, its task and its configuration, from a run's folder or checkpoint file.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it was not written by `memcore train`.
    """
    path = Path(path)
    loaded = load_checkpoint(path / CHECKPOINT if path.is_dir() or not path.exists() else path)
    config = loaded.meta.get("user") or {}
    if not {"task", "model", "train"} <= config.keys() or config["model"] not in MODELS:
        raise CheckpointError(
            f"memcore.load_run: {str(loaded.path)!r} must be written by `memcore train`, got one without its configuration"
        )
    model, task = build(config, data=data)
    loaded.restore(model)
    return model.eval(), task, config


def _folder(path: Path, resume: bool) -> Path:
    """Make the run's folder, or say why it cannot be one."""
    if resume:
        return path
    if path.is_dir() and (path / CHECKPOINT).exists():
        raise ValueError(f"memcore.train: 'out' must be a folder without a run, got {str(path)!r}; add --resume to continue it")
    if path.exists() and not path.is_dir():
        raise ValueError(f"memcore.train: 'out' must be a folder, got the file {str(path)!r}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise ValueError(f"memcore.train: 'out' must be a writable folder, got {str(path)!r} ({e.strerror})") from e
    return path
