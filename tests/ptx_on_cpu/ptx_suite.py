"""memcore's operators through compiled PTX: Triton's kernels and nvcc's, launched by their own host code, run by the emulator.

`emulated(Emulator(...))` lets every memcore operator that has such kernels run on them, on CPU tensors. Each launch runs in several
orders from the same state; the results must agree bit for bit.

A new operator needs an entry in tests/cases.py and nothing here: its kernels are found by their files, kernels/<op>/triton.py with
<op>_fwd and <op>_bwd, csrc/cuda/<op>.cu, and its launches through the hooks of kernels/_triton.py and csrc/cuda/mc_device.h. The contract,
the mutants and the counted traffic then run over its samples; `ptx_traffic.py` and `ptx_mutants.py NAME` add it to the committed tables.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from made_once import made_once
from ptx_machine import ORDERS, Kernel, Launch, PtxError, Site
from ptx_program import Module

__all__ = ["Emulator", "Record", "emulated", "missing", "nvcc_ptx", "nvcc_version", "operators", "triton_kernel"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
OUT = ROOT / "build" / "ptx_on_cpu"
sys.path.append(str(HERE.parent / "cuda_on_cpu"))

BACKENDS = ("triton", "cuda")
COMPOSED = ("ntm_addressing", "ntm_step")  # made of the other operators' functions; Triton takes seconds for each kernel
SETS = "knn_scan_"  # of these kernels' candidates, integers of 64 bits, the order is free


@lru_cache(maxsize=None)
def missing(backend: str) -> str:
    """Why kernels of this backend cannot be compiled here; empty if they can."""
    if backend == "triton":
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            return "TRITON_INTERPRET is set: nothing compiles in this process"
        if find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        return ""
    if shutil.which("nvcc") is None:
        return "no nvcc on the PATH"
    import shim_build

    return "" if shim_build.compiler() else "no C++ compiler for the CUDA kernels' host code"


@lru_cache(maxsize=None)
def operators(backend: str) -> tuple[str, ...]:
    """Operators that have kernels of this backend."""
    if backend == "triton":
        return tuple(sorted(p.parent.name for p in (ROOT / "kernels").glob("*/triton.py")))
    import shim_build

    return tuple(shim_build.operators())


# Compiling ------------------------------------------------------------------------------------------------------------


def triton_key(source, num_warps: int, arch: int) -> tuple:
    frozen = lambda d: tuple(sorted((k, str(v)) for k, v in d.items()))
    return source.fn.fn.__qualname__, frozen(source.signature), frozen(source.constants), frozen(source.attrs), num_warps, arch


_triton: dict[tuple, tuple[Kernel, int]] = {}


def triton_compile(source, num_warps: int, arch: int):
    """triton.compile for an NVIDIA GPU that need not be there, as far as PTX: ptxas would take half the time, and nothing here runs what it makes."""
    import triton
    from triton.backends.compiler import GPUTarget

    def hook(backend=None, stages=None, *_):
        if stages is None:
            return "ptx alone", "ptx alone"  # a key of its own in Triton's cache
        stages["cubin"] = lambda ptx, metadata: b""

    runtime = triton.knobs.runtime
    before, runtime.add_stages_inspection_hook = runtime.add_stages_inspection_hook, hook
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
    finally:
        runtime.add_stages_inspection_hook = before


def triton_kernel(source, num_warps: int, arch: int) -> tuple[Kernel, int]:
    """(kernel, bytes of dynamic shared memory)"""
    key = triton_key(source, num_warps, arch)
    if key not in _triton:
        made = triton_compile(source, num_warps, arch)
        _triton[key] = Kernel(made.asm["ptx"], made.metadata.name), made.metadata.shared
    return _triton[key]


@lru_cache(maxsize=None)
def nvcc_ptx(op: str, arch: int) -> str:
    """PTX of csrc/cuda/<op>.cu, kept in build/ by the contents it is made from: the library's own where that was built with it, else compiled."""
    source = CUDA / f"{op}.cu"
    digest = hashlib.sha256(source.read_bytes())
    for p in headers():
        digest.update(p.name.encode() + p.read_bytes())
    digest.update(nvcc_version().encode())
    out = OUT / f"{op}.sm_{arch}.{digest.hexdigest()[:16]}.ptx"

    def make(to: Path) -> None:
        if text := built_ptx(op, arch):
            to.write_text(text)
            return
        command = ["nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-ptx", f"-arch=compute_{arch}", "-o", str(to), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    made_once(out, f"{op}.sm_{arch}.*.ptx", make)
    return out.read_text()


def headers() -> list[Path]:
    """What the CUDA sources include of ours."""
    own = sorted(CUDA.glob("*.h"))
    return own + sorted({(CUDA / name).resolve() for h in own for name in re.findall(r'#include "(\.\./[^"]+)"', h.read_text())})


def built_ptx(op: str, arch: int) -> str:
    """The PTX for this architecture in the library's object file; empty if there is none, or a source that is newer."""
    from gpu_resources import cuobjdump

    obj = ROOT / "build" / "native" / f"cuda-{op}.cu.o"
    sources = [CUDA / f"{op}.cu", *headers()]
    if cuobjdump() is None or not obj.exists() or max(p.stat().st_mtime for p in sources) > obj.stat().st_mtime:
        return ""
    done = subprocess.run([cuobjdump(), "-ptx", "-arch", f"sm_{arch}", str(obj)], capture_output=True, text=True)
    at = done.stdout.find(".version") if not done.returncode else -1
    return done.stdout[at:] if at >= 0 else ""


@lru_cache(maxsize=1)
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


@lru_cache(maxsize=None)
def nvcc_module(op: str, arch: int) -> Module:
    return Module(nvcc_ptx(op, arch))


@lru_cache(maxsize=None)
def nvcc_kernel(op: str, symbol: str, arch: int) -> Kernel:
    import shim_build

    for name in sorted((p.stem for p in shim_build.kernels()), key=lambda name: not name.startswith(op)):
        module = nvcc_module(name, arch)
        if symbol in module.names:
            return Kernel(module, symbol)
    raise PtxError(f"nvcc made no kernel {symbol}")


# Launching ------------------------------------------------------------------------------------------------------------


def array_of(t: Tensor) -> np.ndarray:
    """The tensor's bytes, shared with it."""
    if not t.is_contiguous():
        raise ValueError("kernels are given contiguous tensors")
    return t.detach().as_strided((t.numel(),), (1,)).view(torch.uint8).numpy() if t.numel() else np.empty(0, np.uint8)


def same_sets(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether bytes are the same but for the order of their integers of 64 bits."""
    n = len(a) // 8 * 8
    return np.array_equal(np.sort(a[:n].view("u8")), np.sort(b[:n].view("u8"))) and np.array_equal(a[n:], b[n:])


@dataclass
class Record:
    """One launch that was run."""

    op: str
    way: str
    kernel: str
    grid: tuple
    threads: int
    shared: int
    report: Launch
    kernel_object: Kernel | None = None
    args: list | None = None
    memory: list | None = None
    before: list[np.ndarray] | None = None
    after: list[np.ndarray] | None = None
    replicas: bool = False

    def caught(self, without: Site, orders: tuple[str, ...] = ORDERS, races: bool = True) -> str:
        """How the launch, run again without one barrier, shuffle or mask, shows that it is wrong; empty if it does not."""
        arrays = [a for a in (*self.args, *self.memory) if isinstance(a, np.ndarray)]
        try:
            for order in orders:
                for a, b in zip(arrays, self.before):
                    a[...] = b
                try:
                    self.kernel_object.launch(
                        self.grid, (self.threads, 1, 1), self.args, self.shared, order=order, memory=self.memory,
                        races=races and order == "lockstep", replicas=self.replicas, without=without,
                    )  # fmt: skip
                except PtxError as e:
                    return str(e)
                if any(not np.array_equal(a, b) for a, b in zip(arrays, self.after)):
                    return f"{order}: another result"
        finally:
            for a, b in zip(arrays, self.after):
                a[...] = b
        return ""


@dataclass
class Emulator:
    """How launches are run, and what they did."""

    backend: str
    arch: int
    orders: tuple[str, ...] = ORDERS
    races: bool = True
    count: bool = False
    keep: bool = False
    """Keep what is needed to run every launch again."""
    records: list[Record] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=dict)
    """Address of a tensor -> its name in the operator's schema."""

    def run(self, op: str, way: str, kernel: Kernel, grid, threads: int, args: list, shared: int, memory: list[np.ndarray], names) -> None:
        arrays = [a for a in (*args, *memory) if isinstance(a, np.ndarray)]
        before = [a.copy() for a in arrays]
        first: list[np.ndarray] | None = None
        for order in self.orders:
            if first is not None:
                for a, b in zip(arrays, before):
                    a[...] = b
            report = kernel.launch(
                grid, (threads, 1, 1), args, shared, order=order, memory=memory, names=names,
                races=self.races and order == "lockstep", replicas=self.backend == "triton", count=self.count and first is None,
            )  # fmt: skip
            if first is None:
                first = [a.copy() for a in arrays]
                record = Record(op, way, kernel.program.name, tuple(grid), threads, shared, report)
                if self.keep:
                    record.kernel_object, record.args, record.memory, record.before, record.after = kernel, args, memory, before, first
                    record.replicas = self.backend == "triton"
                self.records.append(record)
            else:
                for name, a, b in zip([*names, *[""] * len(arrays)], arrays, first):
                    if not np.array_equal(a, b) and not (SETS in kernel.program.name and same_sets(a, b)):
                        raise PtxError(f"{kernel.program.name}: {name or 'an array'} depends on the order of the warps (a barrier is missing)")

    def name(self, t: Tensor, parameter: str = "workspace") -> str:
        """The tensor's name in the schema; of others the address too, until it is known which of them are outputs."""
        return self.labels.get(t.data_ptr(), f"{parameter}@{t.data_ptr()}")

    def triton(self, op: str, way: str, args: tuple):
        shared = import_module("memcore.kernels._triton")
        function = getattr(import_module(f"memcore.kernels.{op}.triton"), f"{op}_{way}")

        def hook(launch) -> None:
            source = launch.source()
            kernel, bytes_ = triton_kernel(source, launch.num_warps, self.arch)
            values, names = [], []
            for name, kind in source.signature.items():
                if kind != "constexpr":
                    v = launch.arguments[name]
                    if isinstance(v, Tensor):
                        names.append(self.name(v, name))
                        v = array_of(v)
                    values.append(v)
            self.run(op, way, kernel, launch.grid, 32 * launch.num_warps, values, bytes_, [], names)

        with shared.launching(hook):
            return function(*args)

    def cuda(self, op: str, way: str, args: tuple):
        import cuda_shim

        library = cuda_shim.load()
        tensors = [a for a in args if isinstance(a, Tensor)]
        problem: list[BaseException] = []

        def launched(symbol, blocks, threads, shared, argument, size) -> None:
            if problem:
                return
            try:
                kernel = nvcc_kernel(op, library.mc_shim_name(symbol).decode(), self.arch)
                known = [*tensors, *made.tensors]
                names = [self.name(t) for t in known]
                self.run(op, way, kernel, (blocks, 1, 1), threads, [ctypes.string_at(argument, size)], shared, [array_of(t) for t in known], names)
            except BaseException as e:  # ctypes would only print it
                problem.append(e)

        callback = cuda_shim._RECORDER(launched)
        library.mc_shim_record(callback)
        try:
            with _Made() as made:  # a redispatch passes the mode by, what the kernel allocates does not
                raw = getattr(torch.ops.memcore, f"_{op}_{way}_cuda").default
                out = raw.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        finally:
            library.mc_shim_record(None)
        if problem:
            raise problem[0]
        return out

    def call(self, op: str, way: str, schema, args: tuple):
        self.labels = {v.data_ptr(): a.name for a, v in zip(schema.arguments, args) if isinstance(v, Tensor) and v.numel()}
        first = len(self.records)
        out = getattr(self, self.backend)(op, way, args)
        made = _output_names(way, schema, args, (out,) if isinstance(out, Tensor) else out)
        for record in self.records[first:]:
            record.report.traffic = {_final(k, made): t for k, t in record.report.traffic.items()}
        return out


def _output_names(way: str, schema, args: tuple, outputs: tuple) -> dict[int, str]:
    """Address -> name: a gradient has its input's, as the outputs are in the inputs' order; a forward's memory is memory'."""
    inputs = [(a.name, v) for a, v in zip(schema.arguments, args) if isinstance(v, Tensor) and not a.name.startswith("grad_")]
    names, rest = {}, iter(inputs)
    for i, t in enumerate(outputs):
        if way == "bwd":
            if t.numel():
                names[t.data_ptr()] = "d" + next(name for name, v in rest if v.shape == t.shape and v.is_floating_point())
        else:
            written = any(name == "memory" and v.shape == t.shape for name, v in inputs)
            names[t.data_ptr()] = "memory'" if written else "out" if len(outputs) == 1 else f"out {i}"
    return names


def _final(label: str, made: dict[int, str]) -> str:
    name, _, address = label.partition("@")
    return made.get(int(address), f"workspace {name}") if address else name


class _Made(TorchDispatchMode):
    """The dense tensors that appear inside: outputs and workspaces that C++ allocates."""

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu" and out.is_contiguous() and out.numel():
            if all(t.data_ptr() != out.data_ptr() for t in self.tensors):
                self.tensors.append(out)
        return out


class _Mode(TorchDispatchMode):
    def __init__(self, emulator: Emulator):
        super().__init__()
        self.emulator = emulator
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "memcore" and not kwargs:
            op, _, way = func._schema.name.removeprefix("memcore::").rpartition("_")
            if way in ("fwd", "bwd") and op in operators(self.emulator.backend):
                self.calls.append(f"{op}_{way}")
                return self.emulator.call(op, way, func._schema, args)
        return func(*args, **(kwargs or {}))


@contextmanager
def emulated(emulator: Emulator) -> Iterator[list[str]]:
    """Inside, memcore's operators run on compiled kernels; yields the names of those that did."""
    from paths import PATHS, standing_in_for_a_gpu, use_path

    with use_path(PATHS[-1] if PATHS[-1] != "reference" else "registered"), standing_in_for_a_gpu(), _Mode(emulator) as mode:
        yield mode.calls
