"""Downloads: into a temporary folder of the cache, checked, packed, then put in place."""

import argparse
import hashlib
import http.client
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .._stdio import quiet_pipe
from . import _lists, _mnist, _omniglot
from ._files import DataDamaged, DataNotFound, cache_dir, written

__all__ = ["get", "locate", "main", "names"]

_TIMEOUT = 20.0  # seconds without a byte


class _Source(NamedTuple):
    url: str | None  # None: no download
    files: dict[str, str]  # name -> MD5 or SHA-256 in hex
    check: Callable[[Path], object]  # reads the packed file, raises DataDamaged
    locate: Callable[..., Path]
    remedy: str = ""  # what to do where there is no download
    form: str = ""  # and which file would do


_SOURCES = {
    "omniglot": _Source(
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python",
        {
            "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
            "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
        },
        _omniglot.check,
        _omniglot.locate,
    ),
    "mnist": _Source(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
        {"mnist.npz": "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"},
        _mnist.read,
        _mnist.locate,
    ),
    "sift5k": _Source(
        "https://raw.githubusercontent.com/yahoojapan/NGT/63543779aba4d79959cd238c84dd4c33500bb801/data",
        {"sift-dataset-5k.tsv": "2e638d749b01c62f4c238a53ae712a8ed558f8f901638a79c2020b32f4c86928"},
        _lists.read_vectors,
        lambda root=None: _lists.locate_vectors("sift5k", root),
    ),
    "words": _Source(None, {}, _lists.words, _lists.locate_words, _lists.NO_DOWNLOAD, "words.txt[.xz|.gz], one string a line,"),
}


def names() -> tuple[str, ...]:
    """The data sets there are loaders for; `vectors` reads other sets of its formats too."""
    return tuple(_SOURCES)


def get(name: str, url: str | None = None, *, log: Callable[[str], None] | None = None) -> Path:
    """Download a data set into the cache and return its file there; nothing happens if it is there and whole.

    "words" is no download: its file is returned wherever it is found, and an error tells which package brings it.

    The files are checked by the checksums of their publisher, the pixels by those of this module. Files from another
    `url` may be packed otherwise, so there only the pixels decide.

    Args:
        name: "omniglot", "mnist", "sift5k" or "words".
        url: address of a folder with the same file names, in place of the publisher's.
        log: called with one line a step.

    Raises:
        ValueError: for an unknown name, an address that is not http or https, or one for what is no download.
        DataNotFound: if a file cannot be downloaded.
        DataDamaged: if a checksum differs; the cache is left as it was.
    """
    if name not in _SOURCES:
        raise ValueError(f"memcore.data.get: 'name' must be one of {', '.join(_SOURCES)}, got {name!r}")
    if url is not None and not url.startswith(("http://", "https://")):
        raise ValueError(f"memcore.data.get: 'url' must start with http:// or https://, got {url!r}")
    source, cache, say = _SOURCES[name], cache_dir(), log or (lambda line: None)
    if source.url is None:
        if url is not None:
            raise ValueError(f"memcore.data.get: 'url' must be left out for {name}, which is no download, got {url!r}")
        return _at_hand(name, say)
    target = cache / f"{name}.npz"
    if target.exists():
        try:
            source.check(target)
        except DataDamaged as e:
            say(f"{e}; downloading it anew")
        else:
            say(f"{target} is there and whole")
            return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache) as folder:
            for file, digest in source.files.items():
                address = f"{(url or source.url).rstrip('/')}/{file}"
                say(f"downloading {address}")
                _download(address, Path(folder) / file, name, tuple(source.files))
                if url is None:
                    _verify(Path(folder) / file, digest, address)
            say(f"checking and packing {name}")
            _install(name, Path(folder), target)
    except (DataNotFound, BrokenPipeError):  # the latter is `log`'s, whose reader has gone
        raise
    except OSError as e:
        raise OSError(f"memcore.data.get: cannot write into the cache {cache} ({e}); set XDG_CACHE_HOME to another folder") from e
    say(f"{target} is ready")
    return target


def _at_hand(name: str, say: Callable[[str], None]) -> Path:
    """Where a data set that is no download lies, read once to see that it is whole."""
    source = _SOURCES[name]
    try:
        path = source.locate()
    except DataNotFound as e:
        raise DataNotFound(f"memcore.data.get: {name} is no download and was not found; {source.remedy}, or put {source.form} into {cache_dir()}") from e
    source.check(path)
    say(f"{path} is there and whole")
    return path


def _install(name: str, folder: Path, target: Path) -> None:
    if name == "omniglot":
        _omniglot.pack(folder / "images_background.zip", target)
    elif name == "sift5k":
        _lists.pack_vectors(folder / "sift-dataset-5k.tsv", target)
    else:
        _mnist.read(folder / "mnist.npz")
        with written(target) as part:
            shutil.copyfile(folder / "mnist.npz", part)


def _download(address: str, path: Path, name: str, files: tuple[str, ...]) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "memcore"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, path.open("wb") as f:
            shutil.copyfileobj(answer, f, 1 << 20)
            promised = answer.headers.get("Content-Length")
        if promised is not None and path.stat().st_size != int(promised):
            raise http.client.HTTPException(f"the connection ended after {path.stat().st_size} of {promised} bytes")
    except (OSError, http.client.HTTPException) as e:
        raise DataNotFound(
            f"memcore.data.get: cannot download {address} ({getattr(e, 'reason', None) or e}); fetch {' and '.join(files)} "
            f"elsewhere and put them into {cache_dir()}, or name a mirror: python -m memcore.data get {name} --url ADDRESS"
        ) from e


def _verify(path: Path, digest: str, address: str) -> None:
    with path.open("rb") as f:
        hashed = hashlib.md5() if len(digest) == 32 else hashlib.sha256()
        while block := f.read(1 << 20):
            hashed.update(block)
    if hashed.hexdigest() != digest:
        raise DataDamaged(
            f"memcore.data.get: {address} has {hashed.name.upper()} {hashed.hexdigest()}, expected {digest}; nothing was kept"
        )


def locate(name: str, root: str | None = None) -> Path:
    """The file or folder a data set is read from; DataNotFound if there is none, ValueError for an unknown name."""
    if name not in _SOURCES:
        raise ValueError(f"memcore.data.locate: 'name' must be one of {', '.join(_SOURCES)}, got {name!r}")
    return _SOURCES[name].locate(root)


@quiet_pipe
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m memcore.data` and `memcore data`: returns the exit code, 2 after an error told in one line."""
    parser = argparse.ArgumentParser(
        prog="memcore data",
        description="Find, download and check data sets. Searched are $MEMCORE_DATA, then the cache.",
        epilog=f"The cache is {cache_dir()}; $XDG_CACHE_HOME moves it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="{get,list}", required=True)
    p = commands.add_parser("get", help="download a data set into the cache, checked, or tell where it comes from")
    p.add_argument("name", choices=sorted(_SOURCES), help="which one")
    p.add_argument("--url", help="folder to download the files from, in place of their publisher's")
    commands.add_parser("list", help="where each data set is found")
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    try:
        if args.command == "get":
            get(args.name, args.url, log=lambda line: print(line, file=sys.stderr))
            return 0
        for name in _SOURCES:
            try:
                print(f"{name}: {locate(name)}")
            except DataNotFound as e:
                print(f"{name}: {str(e).partition(': ')[2]}")
        return 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as e:
        print(f"memcore: error: {e}", file=sys.stderr)
        return 2
