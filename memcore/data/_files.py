"""Where data lies, how it is missing or damaged in words, and files written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

__all__ = ["DataDamaged", "DataNotFound", "cache_dir", "damaged", "find", "folders", "missing", "written"]


class DataNotFound(FileNotFoundError):
    """A data set that is in none of the places searched, or cannot be downloaded."""


class DataDamaged(ValueError):
    """A data set that is found but is not what its checksum says."""


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/memcore`, by default `~/.cache/memcore`; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memcore"


def folders(root: str | os.PathLike | None) -> list[Path]:
    """Places to search, in order: `root` alone if it is given, else `$MEMCORE_DATA` (if set) and the cache."""
    if root is not None:
        return [Path(root)]
    named = os.environ.get("MEMCORE_DATA")
    return [*([Path(named)] if named else []), cache_dir()]


def find(root: str | os.PathLike | None, candidates: tuple[str, ...]) -> Path | None:
    """First existing `folder / candidate`, folders before candidates; `root` may also be the file itself."""
    for folder in folders(root):
        if folder.is_file():
            return folder
        for candidate in candidates:
            if (folder / candidate).exists():
                return folder / candidate
    return None


def missing(name: str, root: str | os.PathLike | None, forms: str, remedy: str | None = None) -> NoReturn:
    """Raise DataNotFound: what was looked for, where, and how to get it."""
    places = ", ".join(str(f) for f in folders(root))
    remedy = remedy or f"get it with: python -m memcore.data get {name}, or set MEMCORE_DATA to the folder that holds it"
    raise DataNotFound(f"memcore.data.{name}: not found in {places} (looked for {forms}); {remedy}")


def damaged(name: str, path: Path, why: str) -> NoReturn:
    """Raise DataDamaged for the file or folder `path`."""
    raise DataDamaged(f"memcore.data.{name}: {path} is damaged or not the expected data ({why}); delete it and get it again")


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
