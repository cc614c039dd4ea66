"""MNIST (LeCun, Cortes, Burges): 70,000 handwritten digits, CC BY-SA 3.0."""

import gzip
import hashlib
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._files import DataDamaged, damaged, find, missing

__all__ = ["Mnist", "locate", "mnist", "read"]

_IDX = {  # array -> name of its IDX file, MD5 of that file uncompressed, count
    "x_train": ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb", 60_000),
    "y_train": ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624", 60_000),
    "x_test": ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea", 10_000),
    "y_test": ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637", 10_000),
}
_FIRST = tuple(f"{folder}{_IDX['x_train'][0]}{end}" for folder in ("", "mnist/", "MNIST/raw/", "raw/") for end in ("", ".gz"))


class Mnist(NamedTuple):
    """Digits in the original order, uint8."""

    x_train: np.ndarray  # (60000, 28, 28), 255 = ink
    y_train: np.ndarray  # (60000,)
    x_test: np.ndarray  # (10000, 28, 28)
    y_test: np.ndarray  # (10000,)


def mnist(root: str | os.PathLike | None = None) -> Mnist:
    """MNIST from Keras's `mnist.npz` or the four IDX files, gzipped or not (torchvision's `MNIST/raw` too), checked by MD5.

    Args:
        root: folder or file to read; only there if it is given, else `$MEMCORE_DATA`, else the cache.

    Raises:
        DataNotFound: if no source is found.
        DataDamaged: if the source is unreadable or a checksum differs.
    """
    return read(locate(root))


def locate(root: str | os.PathLike | None = None) -> Path:
    """The npz or the first of the four IDX files that `mnist` reads; DataNotFound if there is none."""
    path = find(root, ("mnist.npz", "mnist/mnist.npz", *_FIRST))
    if path is None:
        missing("mnist", root, "mnist.npz, or the IDX files train-images-idx3-ubyte[.gz] and so on")
    return path


def read(path: Path) -> Mnist:
    """The digits of an npz, or of the IDX files beside the given one, checked."""
    arrays = {}
    try:
        if path.suffix == ".npz":
            with np.load(path) as z:
                arrays = {key: z[key] for key in _IDX}
        else:
            arrays = {key: _idx(path.parent, name) for key, (name, _, _) in _IDX.items()}
    except DataDamaged:
        raise
    except FileNotFoundError as e:
        missing("mnist", path.parent, f"{Path(e.filename).name} beside {path.name}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        damaged("mnist", path, f"{type(e).__name__}: {e}")
    for key, (_, digest, count) in _IDX.items():
        header = struct.pack(">4B", 0, 0, 8, arrays[key].ndim) + struct.pack(f">{arrays[key].ndim}i", *arrays[key].shape)
        found = hashlib.md5(header + arrays[key].tobytes()).hexdigest()
        if found != digest or len(arrays[key]) != count:
            damaged("mnist", path, f"MD5 of {key} is {found}, expected {digest}")
    return Mnist(**arrays)


def _idx(folder: Path, name: str) -> np.ndarray:
    plain = folder / name
    data = plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        damaged("mnist", plain, "no IDX file of bytes")
    sizes = struct.unpack_from(f">{data[3]}i", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes).copy()
