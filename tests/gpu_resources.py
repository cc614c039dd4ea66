"""What every GPU kernel needs on every architecture: registers, spills, stack, shared memory, and the occupancy these allow.

CUDA kernels are read from the library that was built (cuobjdump), Triton's are compiled for GPUs that need not be there. `make gpu-tables`
writes results/gpu/resources.json, which test_gpu_resources.py holds the kernels to, and docs/gpu-resources.md, the same for people.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for p in (HERE, HERE / "cuda_on_cpu", ROOT):
    if str(p) not in sys.path:
        sys.path.append(str(p))

from cases import CASES, Case, Sample  # noqa: E402
from contract import run  # noqa: E402
from memcore import _backend  # noqa: E402
from paths import PATHS, use_path  # noqa: E402

__all__ = [
    "ARCHES", "DTYPES", "FORMS", "GEOMETRIES", "LIMITS", "NVIDIA", "PAGE", "TABLE", "Limits", "TritonKernel", "blocks", "complaints", "cuda", "cuda_launches",
    "heaviest", "missing_cuda", "missing_shim", "missing_triton", "page", "read", "triton_kernels", "triton_usage", "versions",
]  # fmt: skip

TABLE = ROOT / "results" / "gpu" / "resources.json"
PAGE = ROOT / "docs" / "gpu-resources.md"
NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
ARCHES = (*NVIDIA, "gfx942")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Sizes that reach every path and every largest block: a small memory, the largest that one block holds, one that goes by tiles, the widest slot.
GEOMETRIES = {
    "N128_W20": {"N": 128, "W": 20},
    "N128_W64": {"N": 128, "W": 64},
    "N1000_W64": {"N": 1000, "W": 64},
    "N3_W8192": {"N": 3, "W": 8192},
}
HEADS = {"B": 2, "H": 4, "S": 3}
# These take long to compile: the first sample in float32 at the middle geometries stands for all, and one that fills several tiles in registers.
SLOW = ("ntm_step",)
MIDDLE = ("N128_W64", "N1000_W64")
TILES = {"N512_W64": {"N": 512, "W": 64}}
# What is compiled: every geometry in float32, the two with the largest blocks in the narrow types, too.
FORMS = [("float32", g) for g in (*GEOMETRIES, *TILES)] + [(t, g) for t in ("bfloat16", "float16") for g in MIDDLE]


# Occupancy ------------------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Of one multiprocessor: warps, blocks, registers, bytes of shared memory, of which a block may have `block` and costs `reserved` more.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; granularities as in the toolkit's cuda_occupancy.h.
    """

    warps: int
    blocks: int
    shared: int
    block: int
    registers: int = 65536
    reserved: int = 1024


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10, 163 << 10),
    "sm_90": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_120": Limits(48, 24, 100 << 10, 99 << 10),
}


def blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks that one multiprocessor holds at once; shared: bytes of a block, without the driver's share. 0: it cannot run."""
    limit = LIMITS[arch]
    warps = ceil(threads / 32)
    if shared > limit.block:
        return 0
    # A quarter of the multiprocessor serves a quarter of the warps; a warp's registers come in units of 256.
    per_quarter = limit.registers // 4 // (ceil(max(registers, 1) * 32 / 256) * 256)
    room = per_quarter * 4 // warps
    need = ceil((shared + limit.reserved) / 128) * 128
    return min(limit.warps // warps, limit.blocks, room, limit.shared // need)


# CUDA -----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def cuobjdump() -> str | None:
    """The toolkit's, else the one that comes with triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    return str(inside) if inside and inside.exists() else None


def _dump(path: str | Path) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel's symbol, resources) of a library or cubin."""
    done = subprocess.run([cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True)
    if done.returncode and "does not contain device code" not in done.stdout + done.stderr:
        done.check_returncode()
    text = done.stdout
    found, arch = [], ""
    for line in re.finditer(r"^arch = (\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text, re.M):
        if line[1]:
            arch = line[1]
            continue
        # A stack is where spilled registers go; from sm_90 on the driver's share of shared memory is counted in.
        static = int(line[5]) - (LIMITS[arch].reserved if arch in LIMITS and arch != "sm_80" and int(line[5]) else 0)
        found.append((arch, line[2], {"registers": int(line[3]), "stack": int(line[4]) + int(line[6]), "shared": static}))
    return found


def _assembled(path: str | Path) -> list[tuple[str, str, dict[str, int]]]:
    """The same of a library that holds PTX alone: of the float32 kernels with all arrays in shared memory, put through ptxas here."""
    text = subprocess.run([cuobjdump(), "-ptx", str(path)], capture_output=True, text=True).stdout
    found = []
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        for module in text.split("Fatbin ptx code:")[1:]:
            head, *entries = re.split(r"^(?=\.(?:visible|weak) \.entry)", module[module.find(".version") :], flags=re.M)
            entries = [e for e in entries if re.fullmatch(r"\w+ float32", cuda_name(re.search(r"\w+(?=\()", e)[0]))]
            if entries:
                ptx.write_text(head + "".join(entries))
                arch = re.search(r"^\.target (\w+)", head, re.M)[1]
                subprocess.run(["ptxas", f"-arch={arch}", str(ptx), "-o", str(cubin)], check=True)
                found += [(arch, symbol, used) for _, symbol, used in _dump(cubin)]
    return found


_CUDA_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def cuda_name(symbol: str) -> str:
    """_ZN7memcore4cuda15read_fwd_kernelI6__halfLb0EEE.. -> read_fwd_kernel float16 (spilling arrays: .. workspace float16); without a type: float32."""
    size = re.match(r"_ZN7memcore4cuda(\d+)", symbol)
    name, rest = symbol[size.end() :][: int(size[1])], symbol[size.end() + int(size[1]) :]
    of = re.match(r"(?:I(f|6__half|13__nv_bfloat16)?(?:Lb([01])E)?)?", rest)
    return f"{name} {'workspace ' if of[2] == '1' else ''}{_CUDA_TYPES[of[1] or 'f']}"


@lru_cache(maxsize=None)
def missing_cuda() -> str:
    """Why the CUDA kernels cannot be examined here; empty if they can."""
    if _backend.native is None:
        return _backend.native_missing
    if cuobjdump() is None:
        return "no cuobjdump (it comes with the CUDA toolkit and with triton)"
    if shutil.which("nvcc") is None:
        return "no nvcc: the library has no CUDA kernels"
    listed = (subprocess.run([cuobjdump(), kind, _backend.native.__file__], capture_output=True, text=True).stdout for kind in ("-lelf", "-lptx"))
    return "" if any(" file " in text for text in listed) else "the library was built without CUDA kernels"


@lru_cache(maxsize=None)
def missing_shim() -> str:
    """Why the CUDA launchers cannot be asked for their shared memory here; empty if they can."""
    import shim_build

    return "" if shim_build.compiler() else "no C++ compiler (c++, g++, clang++ or $CXX) to build the CUDA launchers for the CPU"


def ptx_alone() -> bool:
    return not _dump(_backend.native.__file__)


def cuda() -> dict[str, dict[str, dict[str, int]]]:
    """kernel -> architecture -> resources, of the library as built."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for arch, symbol, used in (_assembled if ptx_alone() else _dump)(_backend.native.__file__):
        found.setdefault(cuda_name(symbol), {})[arch] = used
    return dict(sorted(found.items()))


def _resized(case: Case, sample: Sample, geometry: str) -> Sample:
    sizes = {**HEADS, **(GEOMETRIES | TILES)[geometry]}
    return sample.resized(**(sizes if "I" not in case.fixed else {k: v for k, v in sizes.items() if k in "BNW"}))


def cuda_launches(arch: str, geometry: str) -> dict[str, tuple[int, int]]:
    """kernel -> (threads, bytes of dynamic shared memory) of the float32 launches at these sizes on this architecture."""
    import cuda_shim

    found = {}
    with cuda_shim.use(), cuda_shim.shared_limit(LIMITS[arch].block), cuda_shim.recorded() as launches:
        for case in CASES:
            if case.name in cuda_shim.operators():
                sample = _resized(case, case.samples[0], geometry)
                run(case.function, case, sample, case.inputs(sample, torch.float32))
        for launch in launches:
            found[cuda_name(launch.kernel)] = (launch.threads, launch.shared)
    return found


# Triton ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def missing_triton() -> str:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: nothing compiles in this process"
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return "" if cuobjdump() else "no cuobjdump beside triton"


class _Recorder(TorchDispatchMode):
    """memcore's operators launch their Triton kernels, into a hook that computes nothing."""

    def __init__(self, operators: set[str], hook) -> None:
        super().__init__()
        self.operators, self.hook = operators, hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "memcore" and not kwargs:
            op, _, way = func._schema.name.removeprefix("memcore::").rpartition("_")
            if way in ("fwd", "bwd") and op in self.operators:
                with import_module("memcore.kernels._triton").launching(self.hook):
                    return getattr(import_module(f"memcore.kernels.{op}.triton"), f"{op}_{way}")(*args)
        return func(*args, **(kwargs or {}))


class TritonKernel(NamedTuple):
    kernel: str
    label: str
    """Kernel, type, block sizes, what is absent, what is a multiple of 16: what decides the code."""
    dtype: str
    geometry: str
    warps: int
    options: Any
    """of the compiler, by whether it is NVIDIA's."""
    source: Any


def _label(launch: Any, source: Any, dtype: str) -> str:
    names = [p.name for p in launch.kernel.params]
    constants = {names[i]: v for (i,), v in source.constants.items()}
    blocks_ = " ".join(f"{k}={v}" for k, v in constants.items() if v is not None)
    absent = ",".join(k.removeprefix("p_") for k, v in constants.items() if v is None)
    sixteens = ",".join(names[i] for (i,) in source.attrs if not names[i].startswith("p_"))
    wide = ",".join(k.removeprefix("p_") for k, v in source.signature.items() if v == "*fp32") if dtype != "float32" else ""
    parts = [dtype, blocks_, f"warps={launch.num_warps}", absent and f"without {absent}", sixteens and f"16|{sixteens}", wide and f"float32 {wide}"]
    return f"{launch.kernel.__name__}: {' '.join(p for p in parts if p)}"


def triton_kernels(dtype: str, geometry: str) -> Iterator[TritonKernel]:
    """Every different kernel that the contract's samples, resized to `geometry`, launch, forward and backward."""
    found: dict[str, TritonKernel] = {}
    operators = {p.parent.name for p in (ROOT / "kernels").glob("*/triton.py")}

    def hook(launch) -> None:
        source = launch.source()
        label = _label(launch, source, dtype)
        found.setdefault(label, TritonKernel(launch.kernel.__name__, label, dtype, geometry, launch.num_warps, launch.options, source))

    with use_path(PATHS[-1] if PATHS[-1] != "reference" else "registered"), _Recorder(operators, hook):
        for case in CASES:
            slow = case.name in SLOW
            wanted = dtype == "float32" and geometry in (*MIDDLE, *TILES) if slow else geometry in GEOMETRIES
            if case.name in operators and wanted:
                for sample in case.samples[: 1 if slow else None]:
                    sample = _resized(case, sample, geometry)
                    run(case.function, case, sample, case.inputs(sample, DTYPES[dtype]))
    yield from found.values()


def triton_usage(kernel: TritonKernel, arch: str) -> dict[str, int]:
    """Compiled for `arch`: registers, stack (where spilled registers go), bytes of shared memory; on gfx942 also scalar registers, waves per SIMD."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    made = triton.compile(kernel.source, target=target, options=kernel.options(not amd))
    if amd:
        text = made.asm["amdgcn"]

        def number(pattern: str) -> int:
            return int(re.search(pattern + r":?\s+(\d+)", text)[1])

        return {
            "registers": number(r"\.vgpr_count"), "scalar": number(r"\.sgpr_count"),
            "stack": number(r"\.private_segment_fixed_size") + 4 * number(r"\.vgpr_spill_count"),
            "scalar_spills": number(r"\.sgpr_spill_count"),  # kept in lanes of vector registers: no memory
            "shared": made.metadata.shared, "waves": number(r"; Occupancy"),
        }  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        ((_, _, used),) = _dump(file.name)
    return {**used, "shared": made.metadata.shared}


# The table ------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of the compilers; None of one that is missing. The numbers are those of these alone."""
    nvcc = shutil.which("nvcc") and re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    return {"nvcc": nvcc[1] if nvcc else "", "triton": import_module("triton").__version__ if find_spec("triton") else ""}


def read() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def complaints(what: str, found: dict[str, dict[str, int]], table: dict[str, dict[str, int]] | None, growth: bool = True) -> list[str]:
    """What is wrong with a kernel's resources on each architecture, given the committed ones: a stack, or any growth; shrinking is a stale table."""
    wrong = [f"{what} on {arch}: {used['stack']} bytes of stack: registers are spilled" for arch, used in found.items() if used["stack"]]
    if table is None:
        return [*wrong, f"{what}: not in {TABLE.name} (make gpu-tables)"]
    for arch, used in found.items() if growth else ():
        for name, n in used.items():
            was = table.get(arch, {}).get(name)
            if was is None or n != was:
                better = was is not None and (n < was) != (name == "waves")
                wrong.append(f"{what} on {arch}: {name} {was} -> {n}" + (" (less: write the table again, make gpu-tables)" if better else ""))
    return wrong


def heaviest(table: dict[str, dict[str, dict[str, int]]]) -> dict[str, str]:
    """kernel -> its float32 label with the most registers on any GPU of NVIDIA's."""
    best: dict[str, tuple[int, str]] = {}
    for label, by in table.items():
        kernel, _, rest = label.partition(": ")
        if rest.startswith("float32"):
            best[kernel] = max(best.get(kernel, (0, "")), (max(by[a]["registers"] for a in NVIDIA), label))
    return {kernel: label for kernel, (_, label) in best.items()}


def triton_all(say=print) -> dict[str, dict[str, dict[str, int]]]:
    """label -> architecture -> resources, of every kernel."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for dtype, geometry in FORMS:
        for kernel in triton_kernels(dtype, geometry):
            if kernel.label not in found:
                found[kernel.label] = {arch: triton_usage(kernel, arch) for arch in ARCHES}
        say(f"Triton, {geometry}, {dtype}: {len(found)} kernels", flush=True)
    return dict(sorted(found.items()))


def _lines(entries: dict[str, Any]) -> str:
    """JSON with a line for each entry."""
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()) + "\n}"


def write(say=print) -> None:
    made = triton_all(say)
    parts = {"versions": versions(), "cuda": cuda(), "triton": made}
    parts["launches"] = {f"{arch} {g}": cuda_launches(arch, g) for arch in NVIDIA for g in GEOMETRIES}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("{\n" + ",\n".join(f'"{name}": {_lines(part)}' for name, part in parts.items()) + "\n}\n", encoding="utf-8")
    PAGE.write_text(page(read()), encoding="utf-8")


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _header(*cells: str) -> list[str]:
    return [_row(*cells), "|" + " --- |" * len(cells)]


def _percent(arch: str, threads: int, registers: int, shared: int) -> str:
    return f"{100 * blocks(arch, threads, registers, shared) * ceil(threads / 32) / LIMITS[arch].warps:.0f} %"


def page(table: dict[str, Any]) -> str:
    """The table for people."""
    v, cuda_, triton_ = table["versions"], table["cuda"], table["triton"]
    spilled = sum(used["stack"] > 0 for by in (*cuda_.values(), *triton_.values()) for used in by.values())
    out = [
        "# What the GPU kernels need",
        "",
        f"Written by `make gpu-tables` with nvcc {v['nvcc']} and Triton {v['triton']}; all numbers are in",
        "[results/gpu/resources.json](../results/gpu/resources.json), and `tests/test_gpu_resources.py` fails where a kernel differs from them. They are what",
        "compilers report, not measurements: no GPU was needed.",
        "",
        f"Kernels that spill registers or use a stack: **{spilled}** of {sum(map(len, (*cuda_.values(), *triton_.values())))} compilations.",
        "Occupancy is the share of a multiprocessor's warps that can be resident at once, from registers, threads and shared memory.",
        "",
        "## CUDA C++",
        "",
        "Blocks of 256 threads. A kernel's second form, *workspace*, is for sizes whose arrays find no room in shared memory. Registers a thread, the most of",
        "float32, bfloat16 and float16:",
        "",
        *_header("kernel", *NVIDIA),
    ]
    forms: dict[str, list[dict[str, dict[str, int]]]] = {}
    for name, by in cuda_.items():
        forms.setdefault(name.rpartition(" ")[0], []).append(by)
    out += [_row(f"`{form}`", *(max(by[a]["registers"] for by in many) for a in NVIDIA)) for form, many in forms.items()]
    out += [
        "",
        f"KiB of shared memory of a float32 block with {HEADS['H']} heads (`ntm_step`: one read, one write head), as its launcher asks for it, and the occupancy that",
        "results:",
        "",
        *_header("memory", "kernel", *NVIDIA),
    ]
    for g in GEOMETRIES:
        launches = {a: table["launches"][f"{a} {g}"] for a in NVIDIA}
        bases = dict.fromkeys(re.sub(r" (workspace )?float32", "", name) for by in launches.values() for name in by)
        for base in bases:
            cells = []
            for a in NVIDIA:
                name = next((n for n in (f"{base} float32", f"{base} workspace float32") if n in launches[a]), None)
                if name is None:  # by tiles on one architecture, in one block on another
                    cells.append("-")
                    continue
                threads, shared = launches[a][name]
                cells.append(f"{shared / 1024:.1f}{' + workspace' if 'workspace' in name else ''}, {_percent(a, threads, cuda_[name][a]['registers'], shared)}")
            out.append(_row(g.replace("_", " "), f"`{base}`", *cells))
    out += [
        "",
        "## Triton",
        "",
        f"{len(triton_)} kernels: every one that the contract's samples launch at {', '.join(g.replace('_', ' ') for g in GEOMETRIES)}",
        f"in float32, and at the middle two in bfloat16 and float16; `ntm_step` at {', '.join((*MIDDLE, *TILES)).replace('_', ' ')}. Here each in its float32 form with the most registers: registers, KiB of shared memory, occupancy; on gfx942 vector registers, KiB of LDS, waves of 8 a SIMD.",
        "",
        *_header("kernel", "form", *ARCHES),
    ]
    for kernel, label in sorted(heaviest(triton_).items()):
        by, warps = triton_[label], int(re.search(r"warps=(\d+)", label)[1])
        cells = [f"{by[a]['registers']}, {by[a]['shared'] / 1024:.1f}, {_percent(a, 32 * warps, by[a]['registers'], by[a]['shared'])}" for a in NVIDIA]
        cells.append(f"{by['gfx942']['registers']}, {by['gfx942']['shared'] / 1024:.1f}, {by['gfx942']['waves']}")
        form = label.partition("float32 ")[2].partition(" without")[0].partition(" 16|")[0]
        out.append(_row(f"`{kernel}`", form, *cells))
    return "\n".join(out) + "\n"


def partial(built: set[str]) -> str:
    """Why a table of a library with code for these architectures would have holes; empty if it would not."""
    lacking = sorted(set(NVIDIA) - built)
    return f"the library has no code for {', '.join(lacking)}: build it without TORCH_CUDA_ARCH_LIST" if lacking else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the page alone, from the table as it is")
    if parser.parse_args().page:
        PAGE.write_text(page(read()), encoding="utf-8")
        return
    for why in (missing_cuda(), missing_triton(), missing_shim()):
        if why:
            sys.exit(f"the table needs everything: {why}")
    if why := partial({arch for arch, *_ in _dump(_backend.native.__file__)}):
        sys.exit(f"the table needs everything: {why}")
    write()


if __name__ == "__main__":
    main()
