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

from ._files import damaged, find, missing, written

__all__ = ["NO_DOWNLOAD", "Vectors", "locate_vectors", "locate_words", "pack_vectors", "read_vectors", "vectors", "words"]

_OPEN = {".xz": lzma.open, ".gz": gzip.open}
_SYSTEM = Path("/usr/share/dict/american-english-huge")
NO_DOWNLOAD = f"apt-get install wamerican-huge (it is read from {_SYSTEM})"
_SHA256 = {"sift5k": "0b6b221c72379938"}
_NGT = "sift-dataset-5k.tsv"  # 5,000 lines of 128 numbers and an identifier; the last 100 are taken as queries
_NGT_BASE, _NGT_QUERY, _NEAREST = 4900, 100, 100


def words(root: str | os.PathLike | None = None) -> list[str]:
    """Distinct strings of a text file, one a line, UTF-8: `words.txt`, `.txt.gz` or `.txt.xz`, or any such file as `root`.

    Without one in `$MEMCORE_DATA` or the cache, Debian's `/usr/share/dict/american-english-huge` is read.

    Args:
        root: folder or file to read; only there if it is given.

    Raises:
        DataNotFound: if there is no such file.
        DataDamaged: if it cannot be unpacked, is not UTF-8 or repeats a string.
    """
    path = locate_words(root)
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


def locate_words(root: str | os.PathLike | None = None) -> Path:
    """The file that `words` reads; DataNotFound if there is none."""
    path = find(root, ("words.txt.xz", "words.txt.gz", "words.txt"))
    if path is None and root is None and _SYSTEM.exists():
        path = _SYSTEM
    if path is None:
        missing("words", root, "words.txt[.xz|.gz], one string a line", f"name any such file as 'root', or: {NO_DOWNLOAD}")
    return path


class Vectors(NamedTuple):
    """Vectors to search, queries, and the exact nearest neighbours."""

    base: np.ndarray  # (N, D)
    query: np.ndarray  # (Q, D)
    neighbors: np.ndarray  # (Q, K) rows of `base`, nearest first
    sqdist: np.ndarray | None  # (Q, K) squared L2 distances, where the source holds them


def vectors(name: str = "sift5k", root: str | os.PathLike | None = None) -> Vectors:
    """A set of vectors: `NAME.npz`, or `NAME_base.fvecs`, `NAME_query.fvecs`, `NAME_groundtruth.ivecs` (TEXMEX).

    "sift5k" is also read from `sift-dataset-5k.tsv` of yahoojapan/NGT: its first 4,900 vectors, its last 100 as queries.

    Args:
        name: of the set, "sift5k" by default.
        root: folder or file to read; only there if it is given, else `$MEMCORE_DATA`, else the cache.

    Raises:
        DataNotFound: if there is no such file.
        DataDamaged: if it is unreadable, or its checksum differs (known for "sift5k").
    """
    return read_vectors(locate_vectors(name, root))


def locate_vectors(name: str = "sift5k", root: str | os.PathLike | None = None) -> Path:
    """The npz, or the first of the other files, that `vectors` reads; DataNotFound if there is none."""
    candidates = tuple(f"{d}{name}{end}" for d in ("", f"{name}/") for end in (".npz", "_base.fvecs"))
    if name == "sift5k":
        candidates += (_NGT,)
    path = find(root, candidates)
    if path is None:
        remedy = "name the folder as 'root'"
        if name == "sift5k":
            remedy += ", or get it with: python -m memcore.data get sift5k"
        missing("vectors", root, ", ".join((*candidates[:2], *candidates[4:])), remedy)
    return path


def read_vectors(path: Path) -> Vectors:
    """The vectors of an npz, of an NGT file, or of the TEXMEX files beside the given one, checked where the checksum is known."""
    try:
        if path.suffix == ".tsv":
            found = _from_ngt(path)
        elif path.suffix == ".npz":
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
    expected = _SHA256.get("sift5k" if path.suffix == ".tsv" else path.stem, "")
    if not digest.startswith(expected):
        damaged("vectors", path, f"sha256 is {digest[:16]}..., expected {expected}...")
    return found


def _from_ngt(path: Path) -> Vectors:
    """The exact neighbours are worked out here: all numbers are integers, and so are the float64 distances; ties go to the lower row."""
    rows = np.loadtxt(path, np.int64, delimiter="\t", ndmin=2)
    if rows.shape != (_NGT_BASE + _NGT_QUERY, 129) or rows[:, :128].min() < 0 or rows[:, :128].max() > 255:
        raise ValueError(f"{rows.shape[0]} lines of {rows.shape[1]} numbers, expected 5000 of 128 bytes and an identifier")
    base, query = np.split(rows[:, :128].astype(np.uint8), [_NGT_BASE])
    b, q = base.astype(np.float64), query.astype(np.float64)
    distance = (q**2).sum(1, keepdims=True) + (b**2).sum(1) - 2 * q @ b.T
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :_NEAREST]
    return Vectors(base, query, nearest.astype(np.int16), np.take_along_axis(distance, nearest, 1).astype(np.int32))


def pack_vectors(source: Path, target: Path) -> None:
    """Write what `source` holds as `target`, an npz that `vectors` reads at once."""
    found = read_vectors(source)
    with written(target) as part, part.open("wb") as f:
        np.savez_compressed(f, **{k: v for k, v in found._asdict().items() if v is not None})
