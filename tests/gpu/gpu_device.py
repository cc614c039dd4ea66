"""What the tests on a GPU need of the device, with stand-ins on the CPU that do the same in its way: streams, graphs, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import memcore
from memcore import _backend
from cases import CASES, Case, Inputs, Sample
from contract import run

__all__ = ["BACKENDS", "Graph", "busy_stream", "call", "moved", "operators", "settled", "through"]

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("native", "triton")


def operators(backend: str) -> set[str]:
    """Those that have kernels of this backend."""
    if backend == "native":
        return {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu")} & {c.name for c in CASES}
    return {p.parent.name for p in (ROOT / "kernels").glob("*/triton.py")}


PAIRS = [(b, c) for b in BACKENDS for c in CASES if c.name in operators(b)]
each_operator = pytest.mark.parametrize("backend, case", [pytest.param(b, c, id=f"{b}-{c.name}") for b, c in PAIRS])


@contextmanager
def through(backend: str, device: str) -> Iterator[None]:
    """memcore on this backend's kernels, skipped where the machine lacks them; the dry run on the CPU takes what is best there."""
    if device != "cpu" and (why := _backend.describe().get("gpu", {}).get(backend, {}).get("missing")):
        pytest.skip(why)
    with memcore.backend("auto" if device == "cpu" else backend):
        yield


def moved(x: Inputs, device: str | torch.device) -> Inputs:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in x.items()}


def call(case: Case, sample: Sample, x: Inputs) -> list[Tensor]:
    """Outputs and gradients of one call, forward and backward."""
    ys, grads = run(case.function, case, sample, x)
    return [*(y.detach() for y in ys), *grads.values()]


def settled(device: str | torch.device) -> None:
    """Everything queued is done, and what went wrong is told here."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def busy_stream(device: str) -> Iterator[None]:
    """A stream of its own that has something long to do before anything queued inside; waited for at the end."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        yield
    stream.synchronize()


class Graph:
    """`function()`, captured once; `replay` runs it again into the same tensors."""

    def __init__(self, function: Callable[[], list[Tensor]], device: str) -> None:
        self.function, self.graph = function, None
        if device == "cpu":
            self.outputs = function()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compilations and lazy set-up
                function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function()

    def replay(self) -> list[Tensor]:
        if self.graph is None:
            for to, new in zip(self.outputs, self.function(), strict=True):
                to.copy_(new)
        else:
            self.graph.replay()
        return [y.clone() for y in self.outputs]


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """Inside, torch refuses whatever waits for the GPU."""
    with nullcontext():
        if device == "cpu":
            yield
            return
        settled(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
