"""What is installed, which implementation each operator runs on, and why a better one does not."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from . import _backend, functional
from . import data as data_sets
from .stores import _table
from .train.experiment import versions

__all__ = ["examine", "text"]

OPTIONAL = {  # module -> (distribution, what it is for)
    "safetensors": ("safetensors", "checkpoints"),
    "matplotlib": ("matplotlib", "plots"),
    "tqdm": ("tqdm", "progress bars"),
    "triton": ("triton", "GPU kernels, torch.compile on GPUs"),
    "PIL": ("pillow", "reading picture files"),
    "pytest": ("pytest", "tests"),
    "hypothesis": ("hypothesis", "tests"),
    "faiss": ("faiss-cpu", "approximate searchers of memcore.DND, comparisons of nearest-neighbour search"),
}
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cu13")  # distributions that all install a module named faiss
SWITCHES = ("MEMCORE_BACKEND", "MEMCORE_CPU_ISA", "MEMCORE_CACHE_MB", "MEMCORE_DATA", "MEMCORE_BUILD_NATIVE", "MEMCORE_NTM_STEP", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def _optional() -> dict[str, dict[str, str | None]]:
    found = {}
    for module, (distribution, use) in OPTIONAL.items():
        version = None
        if importlib.util.find_spec(module) is not None:
            try:
                version = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                version = "unknown"
        found[module] = {"version": version, "for": use}
    return found


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def faiss_warnings(installed: list[str], cuda: str | None) -> list[str]:
    """What is wrong with the faiss wheels that are there beside a torch for this CUDA version (None: a CPU one)."""
    found = []
    if len(installed) > 1:
        found.append(
            f"{' and '.join(installed)} overwrite each other's module faiss; keep one: pip uninstall {' '.join(installed)}, then install it again"
        )
    for name in installed:
        of = name.rpartition("-cu")[2] if "-cu" in name else ""
        if of and cuda is None:
            found.append(f"{name} is for GPUs, and this torch is for CPUs alone")
        elif of and cuda is not None and cuda.partition(".")[0] != of:
            found.append(f"{name} is for CUDA {of}, torch for CUDA {cuda}: two CUDA runtimes in one process; install that of torch's version")
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


def _on_gpu(name: str, info: dict[str, Any]) -> str:
    """What runs operator `name` on GPU tensors, by shape class where that matters."""
    gpu, requested = info["gpu"], info["requested"]
    if requested == "reference":
        return "plain PyTorch (MEMCORE_BACKEND or backend() asks for it)"
    having = [b for b in ("native", "triton") if name in gpu[b]["operators"]]
    there = [b for b in having if not gpu[b]["missing"]]
    if requested != "auto":
        return requested if requested in there else f"refused ({gpu[requested]['missing'] or f'{requested} has no kernel of it'})"
    if not having:
        return "plain PyTorch (no GPU kernel of it)"
    if len(there) < 2:
        return there[0] if there else f"plain PyTorch ({'; '.join(gpu[b]['missing'] for b in having)})"
    found: dict[str, list[str]] = {}
    for shape in ("rows", "block", "tiles", "vast"):
        ways = {way: _backend.preference(f"{name}_{short}", shape) for way, short in (("forward", "fwd"), ("backward", "bwd"))}
        firsts = {way: p.first for way, p in ways.items() if p is not None}
        for way, first in firsts.items():
            label = shape if len(set(firsts.values())) == 1 else f"{shape} {way}"
            if label not in found.setdefault(first, []):
                found[first].append(label)
    return " and ".join(backend if len(found) == 1 else f"{backend} ({', '.join(shapes)})" for backend, shapes in found.items())


def _operators() -> dict[str, dict[str, str]]:
    """For each operator what runs on CPU tensors and on CUDA tensors, with the reason where it is plain PyTorch."""
    info = _backend.describe()
    names = [n for n in functional.__all__ if n[0].islower() and not n.endswith("_")]
    found = {}
    for name in names:
        if info["requested"] == "reference":
            cpu = "plain PyTorch (MEMCORE_BACKEND or backend() asks for it)"
        elif not info["native"]:
            cpu = f"plain PyTorch ({info['native_missing']})"
        elif name not in info["operators"]:
            cpu = "plain PyTorch (no native kernel of it)"
        else:
            cpu = f"native, {info['cpu_isa']}"
        found[name] = {"cpu": cpu, "cuda": _on_gpu(name, info)}
    return found


def _self_check() -> str:
    """One ntm_step, forward and backward, on what runs here against plain PyTorch."""
    from . import backend

    g = torch.Generator().manual_seed(0)
    memory, interface, weights = torch.randn(2, 9, 5, generator=g), torch.randn(2, 32, generator=g), torch.rand(2, 2, 9, generator=g)
    results = []
    for name in (_backend.describe()["requested"], "reference"):
        leaves = [t.clone().requires_grad_() for t in (memory, interface, weights.softmax(-1))]
        with backend(name):
            step = functional.ntm_step(*leaves, read_heads=1, write_heads=1)
            grads = torch.autograd.grad(sum((t**2).sum() for t in step), leaves)
        results.append([*step, *grads])
    difference = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    return f"ntm_step agrees with plain PyTorch to {difference:.1e}" if difference < 1e-3 else f"ntm_step DIFFERS by {difference:.1e}"


def _data(root: str | None) -> dict[str, str]:
    found = {}
    for name in data_sets.names():
        try:
            found[name] = str(data_sets.locate(name, root))
        except (OSError, ValueError) as e:
            found[name] = f"missing: {e}"
    return found


def examine(data: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Everything `memcore doctor` prints, as plain data.

    Args:
        data: folder of the data sets, searched instead of $MEMCORE_DATA and the cache.
    """
    info = _backend.describe()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": versions(),
        "optional": _optional(),
        "machine": {
            "cpu": _cpu(),
            "cores": cores,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "compiler": next((p for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and (p := shutil.which(c))), None),
            "nvcc": shutil.which("nvcc"),
            "executable": sys.executable,
        },
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "backend": info,
        "operators": _operators(),
        "self_check": _self_check(),
        "slot_table": "in Python: " + _table.missing if _table.compiled is None else "built",
        "warnings": faiss_warnings([d for d in FAISS if _installed(d)], torch.version.cuda),
        "data": _data(None if data is None else os.fspath(data)),
        "switches": {name: os.environ[name] for name in SWITCHES if name in os.environ},
    }


def text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    v, m, b = report["versions"], report["machine"], report["backend"]
    lines = [
        f"memcore {v['memcore']}, torch {v['torch']}, numpy {v['numpy']}, Python {v['python']} on {v['machine']}",
        f"{m['cpu']}: {m['cores']} cores, {report['threads']['torch']} torch thread(s); GPUs: {', '.join(m['gpus']) or 'none'}",
        f"C++ compiler: {m['compiler'] or 'none (torch.compile and the native build need one)'}; nvcc: {m['nvcc'] or 'none'}",
        "",
        f"backend: {b['requested']}",
    ]
    if b["native"]:
        lines.append(f"native library: loaded, {b['cpu_isa']} of {', '.join(b['cpu_isa_available'])} (MEMCORE_CPU_ISA chooses)")
        lines.append(f"freed CPU memory kept for reuse: up to {b['cache']['limit'] >> 20} MiB (MEMCORE_CACHE_MB)")
    else:
        lines.append(f"native library: missing: {b['native_missing']}")
    lines.append(f"slot table of memcore.DND: {report['slot_table']}")
    gpu = b["gpu"]
    lines += [
        f"CUDA C++ kernels: {gpu['native']['missing'] and 'missing: ' + gpu['native']['missing'] or 'built'}",
        f"Triton kernels: {gpu['triton']['missing'] and 'missing: ' + gpu['triton']['missing'] or 'triton ' + gpu['triton']['version']}",
        *(f"{where}: {reason}" for where, reason in gpu["unusable"].items()),
        f"self-check: {report['self_check']}",
        "",
        "operators (on GPUs by shape: weights alone are rows; a memory that one block holds; larger ones, by tiles; those of a vast batch):",
    ]
    by_place: dict[tuple[str, str], list[str]] = {}
    for name, places in report["operators"].items():
        by_place.setdefault((places["cpu"], places["cuda"]), []).append(name)
    for (cpu, cuda), names in by_place.items():
        lines += [f"  {', '.join(names)}", f"    CPU: {cpu}", f"    CUDA: {cuda}"]
    lines += ["", "optional packages:"]
    for name, entry in report["optional"].items():
        lines.append(f"  {name:12} {entry['version'] or 'not installed':14} {entry['for']}")
    lines += [f"  warning: {warning}" for warning in report["warnings"]]
    lines += ["", "data:"]
    lines += [f"  {name:12} {where}" for name, where in report["data"].items()]
    if report["switches"]:
        lines += ["", "environment:"] + [f"  {name}={value}" for name, value in report["switches"].items()]
    return "\n".join(lines)
