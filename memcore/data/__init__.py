"""Real data sets: found, checked and read with numpy alone (Pillow for picture files).

Each loader looks in its argument `root`, else in `$MEMCORE_DATA`, else in the cache (`$XDG_CACHE_HOME/memcore`, by
default `~/.cache/memcore`), which `get` and `python -m memcore.data get NAME` fill.
"""

from ._files import DataDamaged, DataNotFound, cache_dir
from ._get import get, locate, main, names
from ._lists import Vectors, vectors, words
from ._mnist import Mnist, mnist
from ._omniglot import Omniglot, omniglot

__all__ = [
    "DataDamaged",
    "DataNotFound",
    "Mnist",
    "Omniglot",
    "Vectors",
    "cache_dir",
    "get",
    "locate",
    "main",
    "mnist",
    "names",
    "omniglot",
    "vectors",
    "words",
]
