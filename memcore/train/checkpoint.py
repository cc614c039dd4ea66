"""Atomic, checksummed checkpoints in one safetensors file: model, optimizer, random generators, metadata. No pickle."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._sealed import atomic_write, read_sealed, write_sealed

__all__ = ["Checkpoint", "CheckpointError", "atomic_write", "load_checkpoint", "save_checkpoint"]

_FORMAT = "memcore-checkpoint-1"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another kind, or of another model."""


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns; `restore` puts it back."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    generators: dict[str, Tensor]
    meta: dict[str, Any]
    best: dict[str, Tensor] | None = None
    extra: dict[str, Tensor] = {}

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Load the weights, and the states of what else is given together with torch's global CPU generator.

        Without an optimizer, for use, these are the best weights where the run kept them; with one, to go on, the last.

        Raises:
            CheckpointError: a parameter is missing, left over or of another shape, or a wanted state was not saved.
        """
        weights = self.model if optimizer is not None or self.best is None else self.best
        have = {k: tuple(v.shape) for k, v in weights.items()}
        want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise CheckpointError(
                    f"memcore.load_checkpoint: {str(self.path)!r} must fit the model: {name!r} must have shape "
                    f"{want.get(name, 'none (absent)')}, got {have.get(name, 'none (absent)')}"
                )
        model.load_state_dict(weights)
        if optimizer is not None:
            if self.optimizer is None:
                raise CheckpointError(f"memcore.load_checkpoint: {str(self.path)!r} holds no optimizer state")
            try:
                optimizer.load_state_dict(self.optimizer)
            except (ValueError, KeyError) as e:
                raise CheckpointError(
                    f"memcore.load_checkpoint: the optimizer state of {str(self.path)!r} does not fit ({e})"
                ) from e
        if generator is not None:
            if "data" not in self.generators:
                raise CheckpointError(f"memcore.load_checkpoint: {str(self.path)!r} holds no generator state")
            generator.set_state(self.generators["data"])
            torch.set_rng_state(self.generators["global"])


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    meta: Mapping[str, Any] | None = None,
    best: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a model, and what is needed to continue its training, in one safetensors file.

    The file is written beside `path` under another name, synced and renamed: an older checkpoint survives a full disk or a
    crash. It carries a sha256 of its content, verified by `load_checkpoint`.

    Args:
        path: file to write; its folder must exist.
        model: its `state_dict()` is saved.
        optimizer: its state, tensors and settings.
        generator: the data stream's generator; torch's global CPU generator is saved with it.
        meta: anything JSON can hold.
        best: another `state_dict()` of the model, the one to use it with.
        extra: further tensors by name.

    Raises:
        OSError: the file cannot be written; the old one is left as it was.
        ImportError: safetensors is not installed.
    """
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"best/{k}": v for k, v in (best or {}).items()}
    tensors.update({f"extra/{k}": v for k, v in (extra or {}).items()})
    record: dict[str, Any] = {"meta": dict(meta or {}), "optimizer": None}
    if optimizer is not None:
        state = optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            plain[str(index)] = {}
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                else:
                    plain[str(index)][key] = value
        record["optimizer"] = {"state": plain, "param_groups": state["param_groups"]}
    if generator is not None:
        tensors["generator/data"] = generator.get_state()
        tensors["generator/global"] = torch.get_rng_state()
    write_sealed(path, _FORMAT, tensors, record)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a checkpoint written by `save_checkpoint`.

    Raises:
        CheckpointError: there is no such file, it is damaged or truncated, or memcore did not write it.
        ImportError: safetensors is not installed.
    """
    path = Path(path)

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"memcore.load_checkpoint: {str(path)!r} must be a memcore checkpoint, got {what}")

    tensors, record = read_sealed(path, _FORMAT, refuse)
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "generator": {}, "extra": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    optimizer = record["optimizer"]
    if optimizer is not None:
        state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in optimizer["state"].items()}
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition("/")
            state[int(index)][key] = tensor
        param_groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in optimizer["param_groups"]]
        optimizer = {"state": state, "param_groups": param_groups}
    return Checkpoint(path, groups["model"], optimizer, groups["generator"], record["meta"], groups["best"] or None, groups["extra"])
