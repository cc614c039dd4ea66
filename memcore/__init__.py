"""memcore: fast, correct memory-augmented neural networks in PyTorch."""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

if not (Path(__file__).parent / "kernels").is_dir():  # a checkout keeps `kernels` and `bench` beside the package
    __path__.append(str(Path(__file__).parent.parent))

from . import functional, reference
from ._backend import backend, empty_cache

_models = ("LSTMBaseline", "LSTMState", "MANN", "MANNCell", "MANNState", "NEC", "NTM", "NTMCell", "NTMState", "QNetwork")
_stores = ("DND",)
_modules = ("data", "models", "rl", "stores", "tasks", "train")
__all__ = ["backend", "empty_cache", "functional", "reference", *_models, *_stores, *_modules]


def __getattr__(name: str):
    if name in _modules:
        return import_module(f".{name}", __name__)
    if name in _models:
        return getattr(import_module(".models", __name__), name)
    if name in _stores:
        return getattr(import_module(".stores", __name__), name)
    raise AttributeError(f"module 'memcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
