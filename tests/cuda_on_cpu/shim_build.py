"""Builds the CUDA sources for the CPU: kernels under the shim, with the glue of csrc/cuda registered for CPU tensors.

Objects are kept in build/cuda_on_cpu by the contents of what they are made from.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from made_once import made_once

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
OUT = ROOT / "build" / "cuda_on_cpu"

COMMON = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
CXX_KERNEL = ["-x", "c++", "-ftls-model=initial-exec"]
KERNEL = [*CXX_KERNEL, "-O1"]
GLUE = ["-O0", "-DMC_ON_CPU=1", "-DMC_ALLOCATE_BY_ATEN=1", "-DTORCH_TARGET_VERSION=0x020d000000000000", "-isystem", str(Path(torch.__file__).parent / "include")]
SANITIZERS = {
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
# Leaks: a launch that is refused leaves its fibers where they are. History: of accesses long ago only the stack is lost.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1:history_size=0"}


def compiler() -> list[str] | None:
    """The C++ compiler, or None."""
    found = shlex.split(os.environ.get("CXX", ""))
    if found:
        return found if shutil.which(found[0]) else None
    return next(([c] for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def _headers(folder: Path) -> str:
    """A digest of all headers that kernels and glue may include."""
    digest = hashlib.sha256()
    for p in sorted([*folder.rglob("*.h"), *HERE.glob("*.h")]):
        digest.update(p.name.encode() + p.read_bytes())
    return digest.hexdigest()


def compile_object(source: Path, flags: list[str], name: str | None = None, headers: Path = ROOT / "csrc") -> Path:
    """The object file of `source`, compiled if there is none of the same contents, flags and headers in the folder `headers`."""
    command = [*compiler(), *COMMON, *flags]
    key = hashlib.sha256("\0".join([_headers(headers), torch.__version__, *command]).encode() + source.read_bytes()).hexdigest()[:16]
    return made_once(OUT / f"{name or source.name}.{key}.o", f"{name or source.name}.*.o", lambda to: _run([*command, "-c", str(source), "-o", str(to)]))


def link(name: str, objects: list[Path], flags: list[str]) -> Path:
    key = hashlib.sha256("\0".join([*map(str, objects), *flags]).encode()).hexdigest()[:16]
    return made_once(OUT / f"{name}.{key}", f"{name}.*", lambda to: _run([*compiler(), *map(str, objects), *flags, "-o", str(to)]))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def kernels() -> list[Path]:
    """The kernel files: all but the one that speaks to the CUDA runtime."""
    return sorted(p for p in CUDA.glob("*.cu") if p.name != "runtime.cu")


def operators() -> list[str]:
    """Operators with CUDA kernels, each in a file of its name; other files help them."""
    return [p.stem for p in kernels() if (ROOT / "kernels" / p.stem).is_dir()]


def library() -> Path:
    """A shared library of all kernels with their glue, for CPU tensors."""
    jobs = [(p, KERNEL) for p in [*kernels(), HERE / "shim_library.cpp"]] + [(p, GLUE) for p in [*sorted(CUDA.glob("*.cpp")), ROOT / "csrc" / "blocks.cpp"]]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
    torch_lib = Path(torch.__file__).parent / "lib"
    return link("memcore_cuda.so", objects, ["-shared", f"-L{torch_lib}", "-ltorch_cpu", "-ldl"])


def wrong_kernels(sanitizer: str | None = None) -> Path:
    """An executable that runs one of the kernels in wrong_kernels.cpp, which each make one mistake."""
    flags = SANITIZERS[sanitizer] if sanitizer else ["-O1"]
    name = f"wrong-{sanitizer or 'plain'}"
    return link(f"{name}.exe", [compile_object(HERE / "wrong_kernels.cpp", [*CXX_KERNEL, *flags], f"{name}.cpp")], flags)


def driver(sanitizer: str, half: bool = False) -> Path:
    """An executable of the kernels under a sanitizer, with the marks of mutants.py, all off; it runs recorded calls (shim_calls.py), those in
    float16 only if `half`."""
    import mutants

    sources = mutants.marked_sources()[0]
    flags, name = SANITIZERS[sanitizer], f"{sanitizer}-half" if half else sanitizer
    files = [*sorted(p for p in sources.glob("*.cu") if p.name != "runtime.cu"), HERE / "shim_driver.cpp"]
    compile_ = lambda p: compile_object(p, [*CXX_KERNEL, *flags, *([] if half else ["-DMC_NO_HALF"])], f"{name}.{p.name}", sources.parent)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_, files))
    return link(f"driver-{name}", objects, [*flags, "-rdynamic", "-ldl"])
