"""The Triton kernels in Triton's interpreter, on CPU tensors: `python interpreted.py` prints one JSON line a case, then {"done": cases}.

A process of its own, because TRITON_INTERPRET counts when triton is imported, and nothing compiles where it is set. Each sample of the
plan goes through memcore.functional, the dispatcher's key CUDA and the chooser, with backend "triton". Names of operators as arguments run these alone.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402

from as_cuda import as_cuda  # noqa: E402
from cases import CASES, assert_close  # noqa: E402
from contract import expected, run  # noqa: E402
from memcore import _backend  # noqa: E402
from memcore.kernels import _triton  # noqa: E402

# The interpreter is NumPy behind Python loops: small blocks are slow, so only the small samples turn every loop.
SMALL = {"tile": 64, "whole": 32, "kept": 256, "row": 16, "heads": 32, "search": 32, "slack": 2}
SMALL_ELEMENTS = 600
NARROW = (torch.bfloat16, torch.float16)


def plan():
    """(case, sample, dtype, block sizes): every sample in float32, the small ones in small blocks too, two in the narrow types.

    Long searches are left to the emulator, and what knn_lookup shares with knn_search to the latter.
    """
    for case in CASES:
        if case.name in _backend._triton_files:
            most = {"knn_search": 300, "knn_lookup": 63}.get(case.name)
            samples = [s for s in case.samples if most is None or s.sizes.get("N", 0) < most]
            for i, sample in enumerate(samples):
                yield case, sample, torch.float32, {}
                elements = sum(v.numel() for v in case.inputs(sample).values() if isinstance(v, torch.Tensor))
                if i > 0 and elements <= SMALL_ELEMENTS and case.name != "knn_lookup":
                    yield case, sample, torch.float32, SMALL
            for sample, dtype in zip(samples[:2], NARROW if case.name != "knn_lookup" else ()):
                yield case, sample, dtype, {}


def check(case, sample, dtype):
    x = case.inputs(sample, dtype)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    with as_cuda("triton") as calls:
        ys, grads = run(case.function, case, sample, x)
    assert calls == [f"{case.name}_fwd", f"{case.name}_bwd"], calls
    wanted, wanted_grads = expected(case, sample, dtype)
    for i, (y, e) in enumerate(zip(ys, wanted, strict=True)):
        assert_close(y, e, dtype=dtype, **case.tolerance(sample, before), what=f"output {i}")
    for k, e in wanted_grads.items():
        assert_close(grads[k], e, dtype=dtype, **case.tolerance(sample, before, backward=True), what=f"gradient of {k}")
    for k, v in before.items():
        assert not isinstance(v, torch.Tensor) or torch.equal(x[k], v), f"{k} was written to"


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of what masks throw away
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    only, cases = set(sys.argv[1:]), 0
    standard = {k: getattr(_triton.sizes, k) for k in SMALL}
    for case, sample, dtype, blocks in plan():
        if only and case.name not in only:
            continue
        for k, v in {**standard, **blocks}.items():
            setattr(_triton.sizes, k, v)
        started, error = time.perf_counter(), ""
        try:
            check(case, sample, dtype)
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        cases += 1
        name = f"{case.name}-{sample.id}-{str(dtype)[6:]}{'-small_blocks' if blocks else ''}"
        print(json.dumps({"case": name, "error": error, "seconds": round(time.perf_counter() - started, 2)}), flush=True)
    print(json.dumps({"done": cases}))


if __name__ == "__main__":
    main()
