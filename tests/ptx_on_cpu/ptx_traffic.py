"""Counted traffic of the GPU kernels, from their compiled PTX: `python tests/ptx_on_cpu/ptx_traffic.py` writes docs/gpu-traffic.md.

A request is one load or store of one warp; its bytes are the different ones it touches, so that copies of a value in several lanes
count once, in several warps or blocks each time. Bytes are what kernels ask for, cache hits included. The least possible is every
tensor that is read once and every tensor that is written once. PyTorch's share: sizes of all inputs and outputs of every aten
call, views free, of the tuned form in bench/baselines.py (`eager`) and of the operator's reference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
for p in (HERE.parents[1], HERE.parent, HERE):
    if str(p) not in sys.path:
        sys.path.insert(0, str(p))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memcore.bench import baselines

from cases import CASES, Case, Inputs, Sample, as_tuple
from contract import cotangents, run
from ptx_suite import BACKENDS, ROOT, Emulator, emulated, missing, nvcc_version, operators

__all__ = ["COMMITTED", "PAGE", "SHAPES", "bars", "page", "row", "text", "versions"]

COMMITTED = ROOT / "results" / "gpu" / "traffic.json"
PAGE = ROOT / "docs" / "gpu-traffic.md"
ARCH = 80
SHARED = 227 * 1024  # bytes of shared memory that one block may have, sm_90

# (sizes, dtype): the copy task's memory, one that fills shared memory, many heads, one beyond shared memory. Bytes are proportional to B.
SHAPES = {
    "copy": ({"B": 2, "H": 2, "N": 128, "W": 20, "Hr": 1, "Hw": 1}, torch.float32),
    "copy half": ({"B": 2, "H": 2, "N": 128, "W": 20, "Hr": 1, "Hw": 1}, torch.float16),
    "medium": ({"B": 1, "H": 2, "N": 512, "W": 64, "Hr": 1, "Hw": 1}, torch.float32),
    "heads": ({"B": 1, "H": 9, "N": 128, "W": 20, "Hr": 5, "Hw": 4}, torch.float32),
    "large": ({"B": 1, "H": 2, "N": 2048, "W": 64, "Hr": 1, "Hw": 1}, torch.float32),
}


def shape_of(case: Case, name: str) -> tuple[Sample, torch.dtype]:
    """The operator's first sample at another size; options that say how many heads there are follow."""
    sizes, dtype = SHAPES[name]
    first = case.samples[0]
    heads = {"read_heads": sizes["Hr"], "write_heads": sizes["Hw"]}
    return Sample(name, {**first.sizes, **sizes}, {k: heads.get(k, v) for k, v in first.options.items()}, first.twist), dtype


def fits(case: Case, name: str) -> bool:
    """Whether a memory fits a block's shared memory; true of operators without one."""
    sizes, dtype = SHAPES[name]
    return "memory" not in case.shapes or sizes["N"] * sizes["W"] * dtype.itemsize <= SHARED


# Eager ------------------------------------------------------------------------------------------------------------------


def size(t: Tensor) -> int:
    """Bytes that are there: an expanded dimension is one."""
    n = t.element_size()
    for length, stride in zip(t.shape, t.stride()):
        n *= length if stride else min(length, 1)
    return n


class _Counter(TorchDispatchMode):
    _FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
    _WRITES_ONLY = ("copy_", "fill_", "zero_")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        flat = [t for a in (*args, *(kwargs or {}).values()) for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        made = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        if name in self._FRESH:
            return out
        mutates = func._schema.is_mutable
        if not mutates and made and all(any(t.untyped_storage()._cdata == f.untyped_storage()._cdata for f in flat) for t in made):
            return out  # a view
        self.bytes += sum(map(size, flat[1:] if name in self._WRITES_ONLY else flat)) + sum(map(size, made))
        return out


def plain(f, case: Case, sample: Sample, x: Inputs) -> dict[str, int]:
    """{"fwd", "bwd"} -> bytes that PyTorch moves for f(**x)."""
    x = {k: v for k, v in x.items() if v is not None}
    leaves = [x[k].requires_grad_() for k in case.differentiable if k in x]
    with _Counter() as forward:
        ys = as_tuple(f(**x, **sample.options))
    pairs = [(y, g) for y, g in zip(ys, cotangents(ys)) if g is not None]
    with _Counter() as backward:
        torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return {"fwd": forward.bytes, "bwd": backward.bytes}


def tuned(case: Case):
    """The operator as bench/baselines.py has it; its NTM step takes an interface vector ordered in its own way."""
    if case.name == "ntm_step":
        return lambda memory, interface, previous, **o: baselines.eager_ntm_step(memory, interface, previous, **o)
    return baselines.eager.get(case.name)


# Kernels ----------------------------------------------------------------------------------------------------------------


COLUMNS = ("bytes", "read", "read_requests", "read_sectors", "written", "write_requests", "write_sectors")


def row(backend: str, case: Case, name: str) -> dict[str, dict]:
    """{"fwd", "bwd"} -> launches, thread instructions, bytes of PyTorch, and COLUMNS of every tensor and of all workspaces."""
    sample, dtype = shape_of(case, name)
    emulator = Emulator(backend, ARCH, orders=("lockstep",), races=False, count=True)
    with emulated(emulator):
        run(case.function, case, sample, case.inputs(sample, dtype))
    forms = {"reference": case.reference, "eager": tuned(case)}
    others = {k: plain(f, case, sample, case.inputs(sample, dtype)) for k, f in forms.items() if f is not None}
    made = {}
    for way in ("fwd", "bwd"):
        records = [r for r in emulator.records if r.way == way]
        tensors: dict[str, list[int]] = {}
        for record in records:
            for label, t in record.report.traffic.items():
                if t.atomics and not label.startswith("workspace "):  # a few counters there; bytes of atomics are not counted
                    raise NotImplementedError(f"atomics on {label}")
                if label.startswith("constant ") or not t.load_bytes + t.store_bytes:
                    continue
                counts = t.load_bytes, t.load_requests, t.load_sectors, t.store_bytes, t.store_requests, t.store_sectors
                key = "workspace" if label.startswith("workspace ") else label
                before = tensors.get(key, [0] * len(COLUMNS))
                tensors[key] = [max(before[0], t.nbytes), *(a + b for a, b in zip(before[1:], counts))]
        issued = sum(r.report.instructions for r in records)
        made[way] = {"launches": len(records), "instructions": issued, **{k: v[way] for k, v in others.items()}, "tensors": dict(sorted(tensors.items()))}
    return made


def of(way: dict, tensor: str) -> dict[str, int]:
    return dict(zip(COLUMNS, way["tensors"].get(tensor, [0] * len(COLUMNS))))


def least(way: dict) -> int:
    """Every tensor once in if it is read, once out if it is written."""
    rows = [of(way, k) for k in way["tensors"] if k != "workspace"]
    return sum(t["bytes"] * ((t["read"] > 0) + (t["written"] > 0)) for t in rows)


def moved(way: dict) -> int:
    return sum(t["read"] + t["written"] for t in (of(way, k) for k in way["tensors"]))


def times(way: dict, tensor: str, kind: str) -> float:
    """How many times over a tensor is read or written."""
    t = of(way, tensor)
    return t[kind] / t["bytes"] if t["bytes"] else 0.0


def bars(case: Case, name: str, made: dict[str, dict]) -> list[str]:
    """What misses its bar; an empty list is what is wanted.

    Forward, memory is read at most once if it fits shared memory or is only written to, at most twice else, and written once. Backward goes at
    most three times over it and over its gradient. A search's tile of queries reads every key once, and each query those of its 35 candidates again.
    """
    if "keys" in case.shapes:
        n, most = times(made["fwd"], "keys", "read"), 1.01 + 35 * SHAPES[name][0]["B"] / SHAPES[name][0]["N"]
        return [] if 0.99 <= n <= most else [f"{case.name}_fwd, {name}: keys is read {n:.3f} times, at most {most:.3f}"]
    if "memory" not in case.shapes:
        return []
    fwd, bwd = made["fwd"], made["bwd"]
    writes = "memory'" in fwd["tensors"]
    once = fits(case, name) or writes and case.name != "ntm_step"
    limits = [("fwd", "memory", "read", 1.05 if once else 2.0), ("bwd", "memory", "read", 3.0), ("bwd", "dmemory", "written", 1.05)]
    if writes:
        limits += [("fwd", "memory'", "written", 1.05), ("bwd", "grad_0", "read", 3.0)]
    found = [(way, tensor, kind, times(made[way], tensor, kind), most) for way, tensor, kind, most in limits]
    wrong = [f"{case.name}_{way}, {name}: {tensor} is {kind} {n:.3f} times, at most {most}" for way, tensor, kind, n, most in found if n > most]
    if times(fwd, "memory", "read") < 0.9 or times(bwd, "dmemory", "written") != 1 or writes and times(fwd, "memory'", "written") != 1:
        wrong.append(f"{case.name}, {name}: something was not counted")
    return wrong


def measured() -> Iterator[tuple[Case, str, str]]:
    """(case, backend, shape) of every row."""
    for case in CASES:
        for backend in BACKENDS:
            if case.name in operators(backend):
                yield from ((case, backend, name) for name in SHAPES)


# The page ---------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What the counts depend on besides the sources."""
    found = {"torch": torch.__version__.split("+")[0]}
    if not missing("triton"):
        import triton

        found["triton"] = triton.__version__
    if not missing("cuda"):
        found["cuda"] = nvcc_version().strip().splitlines()[-1]
    return found


def number(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:,.0f}"


def sectors(t: dict[str, int], kind: str) -> str:
    """Per request of a tensor's reads or writes."""
    return number(t[kind + "_sectors"] / t[kind + "_requests"]) if t[kind + "_requests"] else "-"


HEAD = """# Counted traffic of the GPU kernels

`python tests/ptx_on_cpu/ptx_traffic.py` writes this page and `results/gpu/traffic.json`, which has every tensor;
`tests/ptx_on_cpu/test_ptx_traffic.py` counts again and asserts the bars. Exact counts of what the compiled PTX (sm_80) asks for, run by the
emulator: **not times**, and nothing of a GPU's caches. Made with {versions}.

- *memory in*, *out*: bytes read of the memory and written to the new memory (backward: to its gradient), over its size. *gradient in*: of the new
  memory. Bars: forward in once (1.05) where it fits a block's shared memory, twice where it does not; out once; backward in at most three times.
- *least*: every tensor that is read once, every tensor that is written once. *all*: bytes asked for, workspaces too, over the least. What
  several warps or blocks read counts each time: vectors of heads mostly, which a cache would give.
- *eager*, *reference*: bytes of PyTorch over those of the kernel, for the tuned form in `bench/baselines.py` and for the readable reference (which
  turns half types to float32 first). Inputs and outputs of every aten call, views free.
- *sectors*: 32 bytes each, per request of a warp: of the largest tensor read / written. Full warps have 2 with 2-byte words, 4 with 4-byte words,
  16 with 16 bytes a lane.
- *instructions*: of PTX that threads issue, over the numbers in the memory (else in the largest tensor). A kernel with few of them can still wait, one
  with many cannot be fast: on an H200 the block-an-element kernels spent their time in them ([gpu.md](gpu.md#what-an-h200-said)).
"""


TAIL = """## What Triton's ntm_step keeps

Triton leaves shared memory to its compiler, so what is read once stays in registers: 8192 elements as one tile, and forward 32768 as
several where the memory fills them (slots and width powers of two, width 16 to 4096). Others are read twice, those of up to 8192 elements that the CUDA
kernel reads once too: there the dispatcher takes the CUDA kernel, as it does for all of `ntm_step`. Compilers said (Triton 3.9, two read and three
write heads, bytes of stack on sm_80 / sm_90 / sm_120, any of which is a spill):

| memory | kept as | warps | stack |
| --- | --- | ---: | ---: |
| 512 x 64 float32 | 8 tiles | 8 | 0 / 0 / 0 |
| 256 x 128, 32 x 1024, 8 x 4096 float32 | 8 tiles | 8 | 0 / 0 / 0 |
| 512 x 64, 256 x 128, 32 x 1024 bfloat16 | 8 tiles | 8 | 0 / 0 / 0 |
| 500 x 60 float32 | 4 masked tiles | 16 | 64 / 96 / 96 |
| 500 x 60 float32 | 8 masked tiles | 16 | 8 / 24 / 0 |
| 129 x 65 float32 | 8 masked tiles | 8 | 64 / 56 / 0 |
| 250 x 112 float32 | 8 masked tiles | 8 | 48 / 0 / 0 |
| 500 x 60 bfloat16 | 8 masked tiles | 8 | 0 / 304 / 0 |
| 1024 x 64 bfloat16 | 16 masked tiles | 8 | 416 / 880 / 536 |
"""


def numbers(sizes: dict[str, int], dtype: torch.dtype, way: dict) -> float:
    """In the memory, or in the largest tensor of an operator without one."""
    own = {"memory", "memory'", "dmemory", "grad_0"} & set(way["tensors"])
    return sizes["B"] * sizes["N"] * sizes["W"] if own - {"grad_0"} else max(of(way, k)["bytes"] for k in way["tensors"] if k != "workspace") / dtype.itemsize


def page(table: dict) -> str:
    lines = HEAD.format(versions=", ".join(f"{k} {v}" for k, v in sorted(table["versions"].items()))).split("\n")
    for name, (sizes, dtype) in SHAPES.items():
        lines += [f"## {name}: " + ", ".join(f"{k} {sizes[k]}" for k in "BHNW") + f", {str(dtype)[6:]}", ""]
        lines += ["| operator | kernel | launches | memory in | out | gradient in | least, KiB | all | eager | reference | sectors | instructions |"]
        lines += ["| --- | --- " + "| ---: " * 10 + "|"]
        for key, made in sorted(table["rows"].items()):
            op, shape, backend = key.split("/")
            for way, written in (("fwd", "memory'"), ("bwd", "dmemory")):
                w = made[way]
                if shape != name:
                    continue
                passes = [("memory", "read"), (written, "written")]
                passes += [("grad_0", "read")] if way == "bwd" and "memory'" in made["fwd"]["tensors"] else [("", "read")]
                cells = [f"{times(w, *p):.2f}" if p[0] in w["tensors"] else "-" for p in passes]
                cells += [number(least(w) / 1024), f"{moved(w) / least(w):.2f}"]
                cells += [f"{w[k] / moved(w):.2f}" if k in w else "-" for k in ("eager", "reference")]
                named = [of(w, k) for k in w["tensors"] if k != "workspace"]
                kinds = (("read", "read"), ("written", "write"))
                cells += [" / ".join(sectors(max(named, key=lambda t: t["bytes"] * (t[bytes_] > 0)), kind) for bytes_, kind in kinds)]
                cells += [number(w["instructions"] / numbers(sizes, dtype, w))]
                lines.append(f"| {op} {'forward' if way == 'fwd' else 'backward'} | {backend} | {w['launches']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines) + "\n" + TAIL


def text(table: dict) -> str:
    """As JSON, a line for each direction of each row."""
    rows = [f'  "{k}": {{\n    ' + ",\n    ".join(f'"{w}": {json.dumps(v[w])}' for w in v) + "}" for k, v in sorted(table["rows"].items())]
    head = {"versions": table["versions"], "columns of tensors": COLUMNS}
    return json.dumps(head)[:-1] + ', "rows": {\n' + ",\n".join(rows) + "\n}}\n"


def main() -> None:
    torch.set_num_threads(1)
    for backend in BACKENDS:
        if missing(backend):
            raise SystemExit(f"the table needs both backends: {missing(backend)}")
    rows, wrong = {}, []
    for case, backend, name in measured():
        made = rows[f"{case.name}/{name}/{backend}"] = row(backend, case, name)
        wrong += [f"{backend}: {w}" for w in bars(case, name, made)]
    table = {"versions": versions(), "rows": rows}
    COMMITTED.parent.mkdir(parents=True, exist_ok=True)
    COMMITTED.write_text(text(table))
    PAGE.write_text(page(table))
    print(*wrong, sep="\n")


if __name__ == "__main__":
    main()
