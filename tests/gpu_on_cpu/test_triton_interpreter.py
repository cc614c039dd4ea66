"""The contract's cases through Triton's interpreter; they run in one process of their own, see interpreted.py."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")
@pytest.mark.slow  # by default the PTX suite runs the same kernels compiled
def test_contract():
    env = {k: v for k, v in os.environ.items() if not k.startswith("MEMCORE_")}
    command = [sys.executable, str(HERE / "interpreted.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines and "done" in lines[-1], done.stdout[-2000:] + done.stderr[-4000:]
    *cases, last = lines
    assert len(cases) == last["done"] > 60
    wrong = [f"{c['case']}: {c['error']}" for c in cases if c["error"]]
    assert not wrong, "\n".join(wrong)
