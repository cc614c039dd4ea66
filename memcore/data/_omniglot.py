"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 characters of 50 alphabets, 20 drawings each, MIT licence."""

import functools
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._extras import require
from ._files import DataDamaged, damaged, find, missing, written

__all__ = ["Omniglot", "check", "locate", "omniglot", "pack", "read_bits"]

CHARACTERS, DRAWINGS, SIDE = 1623, 20, 105
BACKGROUND = 964  # Lake's background characters come first
VINYALS_TRAIN = 1200  # training and validation characters of Vinyals et al. come first
SHA256 = "36fc02a2da7b2746cbc586c7d6af60fe816de828c2ed207f66a2e6933b920c20"  # of the packed bits, whatever the source

_PARTS = ("images_background", "images_evaluation")
_FORMS = tuple(
    f"{folder}{name}" for name in ("omniglot.npz", *_PARTS) for folder in ("", "omniglot/", "omniglot-py/", "python/")
)
_DRAWING = re.compile(r"([^/]+)/character(\d+)/(\d{4})_(\d{2})\.png$")


class Omniglot(NamedTuple):
    """All drawings at one size, and the classes of one split."""

    images: np.ndarray  # (1623, 20, size, size) uint8, share of ink in 1/255, read-only
    train: np.ndarray  # (n,) int64 classes to train on
    test: np.ndarray  # (m,) int64 classes to test on, none of them in `train`
    alphabet: np.ndarray  # (1623,) int64 index into `alphabet_names`
    alphabet_names: tuple[str, ...]
    split: str  # the split in words, its seed included
    source: Path

    def at(self, size: int) -> np.ndarray:
        """`images` at another size."""
        return _resized(self.source, self.source.stat().st_mtime_ns, size)[0]


def omniglot(
    root: str | os.PathLike | None = None, *, split: str = "vinyals", seed: int = 0, size: int = 20
) -> Omniglot:
    """Omniglot with its drawings resized by an antialiased bilinear (triangle) filter, ink = 255.

    Read from `omniglot.npz`, from the folders `images_background` and `images_evaluation` or from the zip files of
    these names (brendenlake/omniglot; torchvision's `omniglot-py` too), in `root`, else `$MEMCORE_DATA`, else the cache.
    The drawings are checked by checksum and kept in memory for later calls of the process.

    Args:
        root: folder or file to read; only there if it is given.
        split: "vinyals" (1,200 / 423: training and validation of Vinyals et al. 2016 joined), "lake" (964 / 659:
            background and evaluation), or "random" (1,200 / 423 drawn from `seed`).
        seed: of the random split.
        size: side of the images in pixels, 1..105.

    Raises:
        DataNotFound: if no source is found.
        DataDamaged: if the source is unreadable or its checksum differs.
        ValueError: for an unknown split or a size out of range.
    """
    if split == "lake":
        order, cut, words = np.arange(CHARACTERS), BACKGROUND, "lake (background / evaluation)"
    elif split == "vinyals":
        order, cut, words = np.arange(CHARACTERS), VINYALS_TRAIN, "vinyals (train + validation / test)"
    elif split == "random":
        order, cut = np.random.RandomState(seed).permutation(CHARACTERS), VINYALS_TRAIN
        words = f"random (seed {seed})"
    else:
        raise ValueError(f"memcore.data.omniglot: 'split' must be 'vinyals', 'lake' or 'random', got {split!r}")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= SIDE:
        raise ValueError(f"memcore.data.omniglot: 'size' must be an int from 1 to {SIDE}, got {size!r}")
    source = locate(root)
    images, alphabet, names = _resized(source, source.stat().st_mtime_ns, size)
    train, test = np.sort(order[:cut]).astype(np.int64), np.sort(order[cut:]).astype(np.int64)
    return Omniglot(images, train, test, alphabet, names, f"{words}: {len(train)} / {len(test)} characters", source)


def locate(root: str | os.PathLike | None = None) -> Path:
    """The npz, or the background folder or zip, that `omniglot` reads; DataNotFound if there is none."""
    zips = tuple(f"{form}.zip" for form in _FORMS if form.endswith(_PARTS[0]))
    path = find(root, tuple(f for f in _FORMS if not f.endswith(_PARTS[1])) + zips)
    if path is None:
        missing("omniglot", root, "omniglot.npz, images_background + images_evaluation as folders or .zip")
    if not path.name.endswith(".npz") and not _other_half(path).exists():
        missing("omniglot", path.parent, f"{_other_half(path).name} beside {path.name}")
    return path


def _other_half(path: Path) -> Path:
    return path.with_name(path.name.replace(*_PARTS))


@functools.lru_cache(maxsize=2)
def _resized(source: Path, mtime: int, size: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    bits, alphabet, names = _read(source)
    filter_ = _triangle_filter(size)
    images = np.empty((CHARACTERS * DRAWINGS, size, size), np.uint8)
    step = 200  # all pixels at once would be 1.4 GB
    for i in range(0, len(images), step):
        ink = np.unpackbits(bits[i : i + step], axis=1, count=SIDE * SIDE).reshape(-1, SIDE, SIDE).astype(np.float32)
        images[i : i + step] = np.rint(filter_ @ ink @ filter_.T * 255)
    images = images.reshape(CHARACTERS, DRAWINGS, size, size)
    for shared in (images, alphabet):
        shared.setflags(write=False)
    return images, alphabet, names


def _triangle_filter(size: int) -> np.ndarray:
    """[size, 105]: weights of the antialiased bilinear filter, rows sum to 1."""
    scale = SIDE / size
    centre = (np.arange(size)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(SIDE) + 0.5 - centre) / scale)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _read(source: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Checked bits (32460, 1379), alphabet of each character, alphabet names."""
    if source.name.endswith(".npz"):
        try:
            with np.load(source) as z:
                bits, alphabet, names = z["bits"], z["char_alphabet"].astype(np.int64), tuple(z["alphabet_names"].tolist())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            damaged("omniglot", source, f"{type(e).__name__}: {e}")
    else:
        bits = np.zeros((CHARACTERS * DRAWINGS, (SIDE * SIDE + 7) // 8), np.uint8)
        homes: dict[int, str] = {}
        seen = 0
        for half in (source, _other_half(source)):
            index, part, home = read_bits(half)
            bits[index] = part
            homes.update(home)
            seen += len(index)
        if seen != len(bits):
            damaged("omniglot", source.parent, f"{seen} of {len(bits)} drawings")
        names = tuple(dict.fromkeys(homes[c] for c in range(CHARACTERS)))  # alphabets in the order of the characters
        alphabet = np.array([names.index(homes[c]) for c in range(CHARACTERS)])
    digest = hashlib.sha256(bits.tobytes()).hexdigest()
    if digest != SHA256:
        damaged("omniglot", source, f"sha256 of the drawings is {digest[:12]}..., expected {SHA256[:12]}...")
    if alphabet.shape != (CHARACTERS,) or len(names) != alphabet.max() + 1:
        damaged("omniglot", source, "the alphabets do not match the characters")
    return bits, alphabet, names


def read_bits(half: Path) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Drawings of one folder or zip of `ALPHABET/characterNN/CCCC_DD.png`, with Pillow.

    Returns:
        Drawing numbers [n], packed bits [n, 1379] (row by row, first pixel highest, 1 = ink), alphabet by character.
    """
    image = require("PIL.Image", extra="data")
    index, rows, homes = [], [], {}
    try:
        for name, data in _files(half):
            match = _DRAWING.search(name)
            if match is None:
                continue
            character, drawing = int(match[3]) - 1, int(match[4]) - 1
            pixels = np.asarray(image.open(io.BytesIO(data)).convert("1"))
            if pixels.shape != (SIDE, SIDE) or not (0 <= character < CHARACTERS and 0 <= drawing < DRAWINGS):
                damaged("omniglot", half, f"{name} is no drawing of Omniglot")
            index.append(character * DRAWINGS + drawing)
            rows.append(np.packbits(~pixels.reshape(-1)))
            homes[character] = match[1]
    except DataDamaged:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        damaged("omniglot", half, f"{type(e).__name__}: {e}")
    packed = np.stack(rows) if rows else np.zeros((0, (SIDE * SIDE + 7) // 8), np.uint8)
    return np.array(index, np.int64), packed, homes


def _files(half: Path) -> Iterable[tuple[str, bytes]]:
    if half.is_dir():
        for path in sorted(half.glob("*/character*/*.png")):
            yield path.relative_to(half).as_posix(), path.read_bytes()
    else:
        with zipfile.ZipFile(half) as z:
            for name in z.namelist():
                if name.endswith(".png"):
                    yield name, z.read(name)


def check(source: Path) -> None:
    """Raise DataDamaged unless `source` holds Omniglot."""
    _read(source)


def pack(source: Path, target: Path) -> None:
    """Write what `source` holds as `target`, an npz that `omniglot` reads at once (45 MB, not compressed)."""
    bits, alphabet, names = _read(source)
    with written(target) as part, part.open("wb") as f:
        np.savez(f, bits=bits, char_alphabet=alphabet.astype(np.uint8), alphabet_names=np.array(names))
