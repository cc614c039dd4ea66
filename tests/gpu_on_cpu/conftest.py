"""Helpers of tests/, of this folder and of the CUDA shim can be imported by name."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for p in (HERE, HERE.parent, HERE.parent / "cuda_on_cpu"):
    if str(p) not in sys.path:
        sys.path.insert(0, str(p))
