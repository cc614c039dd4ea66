"""The recurrence's persistent kernel as nvcc compiles it, in three orders of warps that must agree bit for bit; and its counted traffic: however
many steps there are, the memory comes in once and goes out once, beside the copies that are kept for the backward."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptx_suite import Emulator, emulated, missing

if missing("cuda"):
    pytest.skip(missing("cuda"), allow_module_level=True)
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from test_ntm_sequence import compare, draw, gradients, ntm_sequence  # noqa: E402

SMALL = {"T": 2, "B": 1, "checkpoint_every": 2, "R": 2, "clip": 1.0, "S": 2}
MORE = {
    "lengths": {"T": 3, "B": 2, "lengths": [3, 1], "checkpoint_every": 2},
    "tanh": {"lstm": False, "layers": 2, "T": 2, "B": 1, "order": "read_write", "Hw": 2},
    "wide": {"K": 70, "T": 2, "B": 1, "N": 33, "W": 9},
    "only_reads": {"R": 2, "Hw": 0, "T": 2, "B": 1},
}


@pytest.mark.parametrize(
    "arch, sizes",
    [pytest.param(80, SMALL, id="sm_80"), pytest.param(90, SMALL, id="sm_90", marks=pytest.mark.slow)]
    + [pytest.param(80, sizes, id=name, marks=pytest.mark.slow) for name, sizes in MORE.items()],
)
def test_matches_float64(arch, sizes):
    with emulated(Emulator("cuda", arch)) as calls:
        compare(draw(**sizes))
    assert calls == ["ntm_sequence_fwd", "ntm_sequence_bwd"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["staged", "in_place"])
def test_memories_in_the_workspace(form):
    import cuda_shim
    from test_cuda_sequence import FORMS, limits

    drawn = draw(**SMALL)
    with cuda_shim.shared_limit(limits(drawn)[FORMS.index(form)]), emulated(Emulator("cuda", 80)):
        compare(drawn)


class Counter(Emulator):
    """Tells what is made inside by its shape."""

    def name(self, t: Tensor, parameter: str = "made") -> str:
        return super().name(t, "x".join(map(str, t.shape)))


def counted(**sizes) -> list[dict[str, tuple[float, float]]]:
    """Forward and backward: tensor -> how many times over it is read and written."""
    emulator = Counter("cuda", 80, orders=("lockstep",), races=False, count=True)
    with emulated(emulator):
        gradients(ntm_sequence, *draw(**sizes))
    traffic = [r.report.traffic for r in emulator.records]
    return [{k: (t.load_bytes / t.nbytes, t.store_bytes / t.nbytes) for k, t in by.items() if t.nbytes} for by in traffic]


def test_traffic():
    T, B, N, W, every = 4, 1, 24, 16, 2
    forward, backward = counted(T=T, B=B, N=N, W=W, checkpoint_every=every)
    assert forward["memory"] == (1, 0) and forward["memory'"] == (0, 1)
    assert forward["out 5"] == (0, 1)  # what is kept, written once
    for name in ("input", "reads", "weights", "controller"):
        assert forward[name] == (1, 0)
    assert backward["grad_1"] == (1, 0) and backward["dmemory"] == (0, 1)  # the memory's gradient: in once, out once
    assert backward["memory"] == (0, 0)
    copies = T // every * B * N * W
    saved = backward["saved_0"]
    assert saved[1] == 0 and saved[0] < 2  # copies once each, activations once, weights and interface for the step and for rebuilding
    assert copies > 0
