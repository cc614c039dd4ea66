"""The same measurements on another revision, in a git work tree of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rows import _KEY

__all__ = ["measure_base", "ratios"]

_ROOT = Path(__file__).resolve().parent.parent


def _git(*args: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", "-C", str(_ROOT), *args], capture_output=True, text=True)
    except OSError as e:
        raise ValueError(f"memcore bench: '--base' needs git, which does not run here ({e})") from e


def measure_base(ref: str, argv: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of `memcore bench *argv` on revision `ref`: its kernels and package, built there, under this revision's bench.

    Raises:
        ValueError: not a revision of this checkout. RuntimeError: it does not build or run.
    """
    found = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if found.returncode:
        raise ValueError(f"memcore bench: '--base' must be a revision of the git checkout at {_ROOT}, got {ref!r}")
    with tempfile.TemporaryDirectory(prefix="memcore-base-") as folder:
        tree = Path(folder) / "tree"
        added = _git("worktree", "add", "--detach", str(tree), found.stdout.strip())
        if added.returncode:
            raise RuntimeError(f"memcore bench: git worktree add failed: {added.stderr.strip()}")
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(_ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
            env = {**os.environ, "PYTHONPATH": str(tree)}

            def python(*args: str) -> str:
                done = subprocess.run([sys.executable, *args], cwd=tree, env=env, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise RuntimeError(f"memcore bench: {' '.join(args)} failed on {ref}; its messages stand above")
                return done.stdout

            if (tree / "setup.py").exists():
                say(f"building {ref}")
                python("setup.py", "-q", "build_ext", "--inplace")
            say(f"measuring {ref}")
            return json.loads(python("-m", "memcore.bench", *argv, "--no-save", "--json"))
        finally:
            _git("worktree", "remove", "--force", str(tree))


def ratios(base: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str:
    """memcore's times on both revisions. The runs are two processes: the last column takes out what eager did meanwhile."""

    def by_key(rows: Sequence[dict[str, Any]], variant: str) -> dict[tuple, float]:
        return {tuple(r[k] for k in _KEY if k != "variant"): r["ms_median"] for r in rows if r["variant"] == variant}

    before, after = by_key(base, "memcore"), by_key(now, "memcore")
    eager_before, eager_after = by_key(base, "eager"), by_key(now, "eager")
    lines = [["operator", "pass", "threads", "base, ms", "now, ms", "faster", "against eager"]]
    for key in after:
        if key not in before:
            continue
        _, op, shape, dtype, kind, count, *_ = key
        faster = before[key] / after[key]
        drift = eager_after[key] / eager_before[key] if key in eager_before and key in eager_after else None
        lines.append([
            f"{op} {shape} {dtype}", kind, str(count), f"{before[key]:.4g}", f"{after[key]:.4g}", f"{faster:.2f}x",
            "" if drift is None else f"{faster * drift:.2f}x",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
