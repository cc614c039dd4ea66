"""Training: the loop, checkpoints, presets and plots shared by all systems."""

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from .experiment import build, configure, load_run, run
from .loop import Diverged, Interrupted, RunResult, evaluate, train, update
from .optimizers import GravesRMSProp, make_optimizer
from .presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "Diverged",
    "GravesRMSProp",
    "Interrupted",
    "RunResult",
    "build",
    "configure",
    "evaluate",
    "load_checkpoint",
    "load_run",
    "make_optimizer",
    "preset",
    "run",
    "save_checkpoint",
    "train",
    "update",
]
