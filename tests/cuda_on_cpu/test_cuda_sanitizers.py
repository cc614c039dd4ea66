"""The CUDA kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer: recorded calls of the contract's
samples, run by an executable (shim_driver.cpp). Buffers, and the block's arrays, are of exact size. `--slow` takes every sample, and float16, too,
whose kernels are bfloat16's but for the conversions."""

import os
import subprocess

import cuda_shim
import pytest
import shim_build
import shim_calls
import torch

from cases import CASES
from shim_calls import limits_of

DTYPES = (torch.float32, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float16)
NAMES = [c.name for c in CASES if c.name in cuda_shim.operators()]
# Odd sizes, several heads; one memory for the batch where there is such a thing. Each with a type and a limit of its own.
QUICK = ("N63", "shared", "small")


def calls(name: str, every: bool, sanitizer: str):
    case = next(c for c in CASES if c.name == name)
    for i, sample in enumerate(case.samples):
        if every:
            # In threads nothing depends on the type but how rows are staged.
            for j, limit in enumerate(limits_of(case)):
                for dtype in ALL_DTYPES if sanitizer == "address" else ALL_DTYPES[(i + j) % 3 :][:1]:
                    yield from shim_calls.calls_of(case, sample, dtype, limit)
            continue
        kind = next((k for k, part in enumerate(QUICK) if sample.id.startswith(part)), None)
        if sanitizer == "address" and kind is not None:
            for j, limit in enumerate(limits_of(case)):
                yield from shim_calls.calls_of(case, sample, DTYPES[(kind + j) % 2], limit)
        elif kind == 0:
            yield from shim_calls.calls_of(case, sample, DTYPES[i % 2], limits_of(case)[0])
        elif kind == 1:
            yield from shim_calls.calls_of(case, sample, DTYPES[i % 2], limits_of(case)[-1])


def check(name, every, sanitizer, order, tmp_path):
    made = list(calls(name, every, sanitizer))
    assert {c.launcher for c in made} == {f"mc_{name}_fwd", f"mc_{name}_bwd"}
    shim_calls.write(tmp_path / "calls", made)
    done = subprocess.run(
        [str(shim_build.driver(sanitizer, half=every)), str(tmp_path / "calls")], capture_output=True, text=True, timeout=3000,
        env={**os.environ, **shim_build.ENVIRONMENT, "MC_SHIM_SCHED": order},
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("sanitizer", shim_build.SANITIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_sanitizer(name, sanitizer, tmp_path):
    check(name, False, sanitizer, "forward", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer, order", [("address", "forward"), ("address", "random:1"), ("thread", "forward")])
@pytest.mark.parametrize("name", NAMES)
def test_sanitizer_on_every_sample(name, sanitizer, order, tmp_path):
    check(name, True, sanitizer, order, tmp_path)
