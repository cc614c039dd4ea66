"""Optional dependencies: imported at first use, with an error that names what to install."""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional `module`, or raise ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(
            f'memcore: this needs {module.partition(".")[0]!r}, which is not importable ({e}); '
            f'install it with: pip install "memcore[{extra}]"'
        ) from e
