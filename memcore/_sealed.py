"""Files that are whole or not there: atomic writes, and tensors with a record in one checksummed safetensors file. No pickle."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._extras import require

__all__ = ["atomic_write", "read_sealed", "sync_folder", "write_sealed"]


def sync_folder(path: Path) -> None:
    """Make what was created or renamed in a folder survive a power cut."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, finds the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _bytes(t: Tensor) -> bytes:
    return t.reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(tensors: Mapping[str, Tensor], meta: str) -> str:
    h = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        h.update(_bytes(t))
    return h.hexdigest()


def write_sealed(path: str | os.PathLike[str], form: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Tensors and a JSON record in one safetensors file of a named format, with a sha256 of both, written atomically.

    Raises:
        OSError: the file cannot be written; the old one is left as it was. ImportError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", extra="train")
    # clones: tied weights share storage, which the format refuses
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(record)
    header = {"format": form, "record": text, "sha256": _digest(tensors, text)}
    atomic_write(path, safetensors.save(tensors, metadata=header))


def read_sealed(
    path: str | os.PathLike[str], form: str, refuse: Callable[[str], Exception]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a file by `write_sealed`; `refuse(what it is instead)` is raised for any other.

    Raises:
        ImportError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", extra="train")
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise refuse("no such file") from None
    except OSError as e:
        raise refuse(f"a file that cannot be read ({e.strerror})") from e
    try:
        tensors = safetensors.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except Exception as e:  # the reader's own error type, and whatever a damaged header provokes
        raise refuse(f"a damaged or truncated file, or one of another kind ({e})") from e
    if header.get("format") != form:
        raise refuse(f"a safetensors file of format {header.get('format')!r}, expected {form!r}")
    text = header.get("record", "")
    if header.get("sha256") != _digest(tensors, text):
        raise refuse("a damaged file: its checksum does not match its content")
    return tensors, json.loads(text)
