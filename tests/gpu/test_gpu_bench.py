"""`memcore bench --device cuda`: on a GPU for real and small; on the CPU with a stand-in for the device, so that the rest of the code has run."""

import json
import time
from pathlib import Path

import pytest
import torch

from memcore import _backend
from memcore.bench import gpu, runner
from memcore.bench.__main__ import main


class Stand:
    """The CPU in a GPU's place: a wall clock, and graphs that call again."""

    name = "cpu"

    def __init__(self):
        self.graphs = 0

    def sample(self, call, times):
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    def graph(self, call):
        self.graphs += 1
        return call

    def settle(self):
        pass


def test_everything_is_measured(device, monkeypatch):
    monkeypatch.setattr(runner, "COPY_LENGTH", 2)
    variants = [v for v in gpu.VARIANTS if device == "cuda" or v != "compile"]
    stand = Stand() if device == "cpu" else gpu.Cuda("cuda")
    report = gpu.measure_all(stand, gpu.SUITES, sizes=["tiny"], batches=[2], variants=variants, quick=True)
    report = json.loads(json.dumps(report))
    assert {r["op"] for r in report["rows"]} == {*gpu.CASES, "ntm_step", "NTM sequence", "NTM", "knn_search"}
    assert all(r["us_median"] > 0 and r["rounds"] >= 3 for r in report["rows"])
    got = {r["variant"] for r in report["rows"]}
    lacking = {"triton", *(["native"] if _backend.native is None else [])} if device == "cpu" else set()
    assert got == set(variants) - lacking, report["missing"]
    read = {r["variant"]: r for r in report["rows"] if (r["op"], r["pass"]) == ("read", "fwd")}
    assert read["memcore"]["bytes"] == 4 * (3 * 8 * 5 + 3 * 2 * 8 + 3 * 2 * 5)
    assert read["memcore"]["times faster than eager"] == pytest.approx(read["eager"]["us_median"] / read["memcore"]["us_median"])
    table = gpu.markdown(report)
    assert "| read (3,2,8,5) | fwd |" in table and "a copy moves" in table and "| NTM copy B=2" in table
    if device == "cpu":
        assert stand.graphs > 20 and {m.partition(" of ")[0] for m in report["missing"]} == lacking
        assert sum(table.count(f"not measured: {name} of") for name in lacking) == len(report["missing"])


def test_a_wrong_variant_is_not_timed_and_told(monkeypatch):
    case = gpu.CASES["read"]
    monkeypatch.setattr(type(case), "memcore", lambda self: lambda m, w: 1.1 * (w @ m))
    report = gpu.measure_all(Stand(), ["ops"], sizes=["tiny"], only=["read"], variants=["memcore", "eager"], quick=True)
    assert {r["variant"] for r in report["rows"]} == {"eager"}
    (told,) = report["missing"]
    assert "memcore of read" in told and "nothing is timed" in told


def test_the_page_is_drawn_from_the_reports():
    root = Path(__file__).resolve().parents[2]
    assert (root / "docs" / "gpu-benchmarks.md").read_text() == gpu.page(root / "results" / "gpu" / "h200"), "python -m memcore.bench.gpu"


def test_a_backends_backward_is_its_own(monkeypatch):
    """The call that is timed has the backend's choice around all of it."""
    asked = []
    backward = gpu.runnable

    def spy(case, function, inputs, both):
        call = backward(case, function, inputs, both)
        return lambda: asked.append(_backend._requested) or call()

    monkeypatch.setattr(gpu, "runnable", spy)
    gpu.measure_all(Stand(), ["ops"], sizes=["tiny"], only=["read"], variants=["native"], quick=True)
    assert set(asked) == ({"native"} if _backend.native is not None else set())


def test_arguments():
    with pytest.raises(ValueError, match="'--device' must be cpu, cuda or cuda:N, got 'tpu'"):
        main(["ops", "--device", "tpu"])
    with pytest.raises(ValueError, match="'--base' must not be given with --device cuda"):
        main(["ops", "--device", "cuda", "--base", "HEAD"])
    with pytest.raises(ValueError, match="'--size' must be small, mid or large on the CPU, got 'huge'"):
        main(["ops", "--size", "huge"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'--device' must be there, got 'cuda' without a CUDA device"):
            main(["ops", "--device", "cuda"])


@pytest.mark.gpu
def test_the_command_writes_one_file(tmp_path, capsys):
    assert main(["ops", "--op", "read", "--device", "cuda", "--quick", "--no-compile", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] and "| read (16,1,128,20)" in capsys.readouterr().out


@pytest.mark.gpu
def test_events_time_the_gpu():
    """Two hundred million cycles take some 0.1 s, whatever the host does."""
    seconds = gpu.Cuda("cuda").sample(lambda: torch.cuda._sleep(200_000_000), 1)
    assert 0.03 < seconds < 1
