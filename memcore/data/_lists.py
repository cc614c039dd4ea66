"""Lists of strings and of vectors."""

import gzip
import hashlib
import lzma
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._files import damaged, find, missing

__all__ = ["Vectors", "vectors", "words"]

_OPEN = {".xz": lzma.open, ".gz": gzip.open}
_SHA256 = {"sift5k": "0b6b221c72379938"}


def words(root: str | os.PathLike | None = None) -> list[str]:
    """Distinct strings of a text file, one a line, UTF-8: `words.txt`, `.txt.gz` or `.txt.xz`, or any such file as `root`.

    Without one in `$MEMCORE_DATA` or the cache, Debian's `/usr/share/dict/american-english-huge` is read.

    Args:
        root: folder or file to read; only there if it is given.

    Raises:
        DataNotFound: if there is no such file.
        DataDamaged: if it cannot be unpacked, is not UTF-8 or repeats a string.
    """
    path = find(root, ("words.txt.xz", "words.txt.gz", "words.txt"))
    system = Path("/usr/share/dict/american-english-huge")
    if path is None and root is None and system.exists():
        path = system
    if path is None:
        remedy = "name any such file as 'root', or: apt-get install wamerican-huge"
        missing("words", root, "words.txt[.xz|.gz], one string a line", remedy)
    try:
        with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8") as f:
            lines = f.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as e:
        damaged("words", path, f"{type(e).__name__}: {e}")
    if lines[-1] == "":
        lines.pop()
    if len(set(lines)) != len(lines):
        damaged("words", path, f"{len(lines) - len(set(lines))} repeated strings")
    return lines


class Vectors(NamedTuple):
    """Vectors to search, queries, and the exact nearest neighbours."""

    base: np.ndarray  # (N, D)
    query: np.ndarray  # (Q, D)
    neighbors: np.ndarray  # (Q, K) rows of `base`, nearest first
    sqdist: np.ndarray | None  # (Q, K) squared L2 distances, where the source holds them


def vectors(name: str = "sift5k", root: str | os.PathLike | None = None) -> Vectors:
    """A set of vectors: `NAME.npz`, or `NAME_base.fvecs`, `NAME_query.fvecs`, `NAME_groundtruth.ivecs` (TEXMEX).

    Args:
        name: of the set, "sift5k" by default.
        root: folder or file to read; only there if it is given, else `$MEMCORE_DATA`, else the cache.

    Raises:
        DataNotFound: if there is no such file.
        DataDamaged: if it is unreadable, or its checksum differs (known for "sift5k").
    """
    candidates = tuple(f"{d}{name}{end}" for d in ("", f"{name}/") for end in (".npz", "_base.fvecs"))
    path = find(root, candidates)
    if path is None:
        missing("vectors", root, ", ".join(candidates[:2]), "name the folder as 'root'")
    try:
        if path.suffix == ".npz":
            with np.load(path) as z:
                found = Vectors(z["base"], z["query"], z["neighbors"], z["sqdist"] if "sqdist" in z else None)
        else:
            stem = path.name.removesuffix("_base.fvecs")
            parts = [path, path.with_name(f"{stem}_query.fvecs"), path.with_name(f"{stem}_groundtruth.ivecs")]
            base, query, neighbors = (np.fromfile(p, np.int32) for p in parts)
            base, query, neighbors = (a.reshape(-1, 1 + a[0])[:, 1:].copy() for a in (base, query, neighbors))
            found = Vectors(base.view(np.float32), query.view(np.float32), neighbors, None)
    except FileNotFoundError as e:
        missing("vectors", path.parent, f"{Path(e.filename).name} beside {path.name}")
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile, zlib.error) as e:
        damaged("vectors", path, f"{type(e).__name__}: {e}")
    digest = hashlib.sha256(found.base.tobytes() + found.query.tobytes() + found.neighbors.tobytes()).hexdigest()
    if path.stem in _SHA256 and not digest.startswith(_SHA256[path.stem]):
        damaged("vectors", path, f"sha256 is {digest[:16]}..., expected {_SHA256[path.stem]}...")
    return found
