"""Files that several test processes want: the first makes them, the others wait."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["made_once"]


def made_once(path: Path, older: str, make: Callable[[Path], None]) -> Path:
    """`path`, by make(where) if it is not there yet; then the files beside it that match `older` go."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"{os.getpid()}.{path.name}.part")  # no other process takes it for an old one
            make(partial)
            for old in path.parent.glob(older):
                if old.suffix != ".lock":
                    old.unlink(missing_ok=True)
            partial.replace(path)
    return path
