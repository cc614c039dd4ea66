"""Builds the package and, where torch and a C++ compiler are at hand, its native library `memcore._C` and, with pybind11, `memcore._store`.

    pip install --no-build-isolation .             the package; torch must be installed first
    python setup.py build_ext --inplace            development: compiles again only what changed

MEMCORE_BUILD_NATIVE  auto (default): without torch or a compiler, warn and build the Python package alone; 0: never; 1: or fail
MEMCORE_CUDA          auto (default): with CUDA kernels where nvcc is found (no GPU is needed, none is looked for); 0: without; 1: or fail
TORCH_CUDA_ARCH_LIST  GPUs to compile for, as for torch ("8.0;9.0+PTX"), or compute_80: PTX alone, quicker to make, which the driver translates
                      at first use; by default ARCHES, of those that nvcc knows
MEMCORE_SANITIZE      e.g. address,undefined: instrumented, in a build folder of its own (`make test-asan`)
CXX, CXXFLAGS, MAX_JOBS as usual.

Sources are found by pattern: `csrc/cpu/<op>_kernel.cpp` (no torch header) is compiled once per instruction set, into
namespace memcore::MC_ISA; `csrc/cuda/*.cu` (no torch header) by nvcc; every other `csrc/**/*.cpp` once, those of csrc/cuda only
with nvcc. torch is found, never imported: its stable ABI needs headers and libtorch_cpu alone, and one binary serves every torch
from the one it was built with (or STABLE, if that is older) on, and every CPython from 3.10 on. `memcore._store` (csrc/store: host-side classes) knows nothing of torch, but pybind11 has no
stable ABI: a wheel that holds it is for one version of CPython.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("MEMCORE_BUILD_NATIVE", "auto")
SANITIZE = os.environ.get("MEMCORE_SANITIZE", "")
CUDA = os.environ.get("MEMCORE_CUDA", "auto")
TORCH = (2, 11)  # the least torch
ARCHES = ("80", "90", "100", "120")  # the last one as PTX, too, which later GPUs translate

ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-ffile-prefix-map={ROOT}=.", "-Icsrc"]
COMMON += [f"-DMC_HAS_{isa.upper()}=1" for isa in ISAS]
KERNEL = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]
KERNEL += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]  # GCC 12 warns about its own AVX-512 intrinsics
CUDA_KERNEL = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"]
STABLE = (2, 13)  # the stable ABI that is built for, or an older torch's own


def torch_version() -> tuple[int, ...]:
    return tuple(map(int, version("torch").split(".")[:2]))


def glue_flags() -> list[str]:
    major, minor = min(torch_version(), STABLE)
    return ["-O2", f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]


def why_not_native() -> str | None:
    """What keeps the native library from being built, or None."""
    if NATIVE == "0":
        return "MEMCORE_BUILD_NATIVE=0"
    if os.name != "posix":
        return "it is built on Linux and macOS only"
    if find_spec("torch") is None:
        return (
            "torch is not importable at build time; install it first, then memcore without build isolation: "
            f'pip install "torch>={TORCH[0]}.{TORCH[1]}" && pip install --no-build-isolation .'
        )
    if torch_version() < TORCH:
        return f"it needs torch >= {TORCH[0]}.{TORCH[1]}, found {version('torch')}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no stable ABI to build for"
    return None


def compiler() -> list[str]:
    found = shlex.split(os.environ.get("CXX", "")) or next(([c] for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if found is None:
        raise CompileError("no C++ compiler found (c++, g++, clang++ or $CXX)")
    return found


def find_nvcc() -> str | None:
    """nvcc, or None where CUDA kernels are not to be built."""
    if CUDA == "0" or SANITIZE or sys.platform == "darwin":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if found is None and CUDA == "1":
        raise CompileError("MEMCORE_CUDA=1, but nvcc is not found (PATH, $NVCC, $CUDA_HOME/bin)")
    return found


def cudart_folder(nvcc: str) -> Path:
    """Where nvcc's toolkit has its static runtime: asked of nvcc itself, which may be a wrapper anywhere."""
    source = next((ROOT / "csrc" / "cuda").glob("*.cu"))
    told = subprocess.run([nvcc, "--dryrun", "-c", str(source)], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", told, re.M)
    if top is None:
        raise CompileError(f"{nvcc} --dryrun does not tell its toolkit's folder")
    folders = [Path(top[1]).resolve() / d for d in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib", "targets/sbsa-linux/lib")]
    found = next((d for d in folders if (d / "libcudart_static.a").exists()), None)
    if found is None:
        raise CompileError(f"no libcudart_static.a in {', '.join(map(str, folders))}")
    return found


def gpu_flags(nvcc: str) -> list[str]:
    """What to compile for, of TORCH_CUDA_ARCH_LIST or ARCHES."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if bad := [a for a in wanted if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?|compute_\d+[a-z]?", a)]:
        raise CompileError(f"TORCH_CUDA_ARCH_LIST: {', '.join(bad)} not understood; write numbers, as in 8.0;9.0+PTX")
    if not wanted:
        known = [a for a in ARCHES if f"compute_{a}" in run([nvcc, "--list-gpu-arch"]).split()]
        if not known:
            raise CompileError(f"{nvcc} compiles for none of sm_{', sm_'.join(ARCHES)}")
        wanted = [*known, f"compute_{known[-1]}"]
    number = lambda a: a.removeprefix("compute_").removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number(a)},code=sm_{number(a)}" for a in wanted if not a.startswith("compute_")]
    return flags + [f"-gencode=arch=compute_{number(a)},code=compute_{number(a)}" for a in wanted if a.startswith("compute_") or a.endswith("+PTX")]


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as e:
        raise CompileError(f"{command[0]}: {e.strerror}") from None
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)
    return done.stdout


def check_no_shared_code(obj: Path, isa: str) -> None:
    """Refuse weak symbols: the linker keeps one copy of each, and an AVX-512 copy would crash the baseline path."""
    if not shutil.which("nm"):
        return
    weak = [line.split()[-1] for line in run(["nm", str(obj)]).splitlines() if re.search(r" [WVu] ", line)]
    if foreign := [s for s in weak if f"{len(isa)}{isa}" not in s]:
        raise CompileError(f"{obj.name}: inline code outside namespace memcore::{isa} is not inlined: {', '.join(foreign)}")


def why_no_store() -> str | None:
    """What keeps the store's slot table from being built beside the native library, or None."""
    if find_spec("pybind11") is None:
        return "pybind11 is not importable at build time (pip install pybind11)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"there is no Python.h in {sysconfig.get_path('include')}"
    return None


class Target:
    """One output file with the command that makes it, remade when the command or a file it reads has changed."""

    def __init__(self, output: Path, command: list[str], inputs: list[Path], key: str, isa: str = "") -> None:
        self.output, self.command, self.inputs, self.isa = output, command, inputs, isa
        self.stamp, self.listed = output.with_suffix(".cmd"), output.with_suffix(".d")
        self.key = f"{key}\n{shlex.join(command)}"

    def fresh(self) -> bool:
        if not (self.output.exists() and self.stamp.exists()) or self.stamp.read_text() != self.key:
            return False
        inputs = list(self.inputs)
        if self.listed.exists():  # the headers, as the compiler found them
            words = re.split(r"(?<!\\)\s+", self.listed.read_text().replace("\\\n", " ").strip())
            inputs += [ROOT / w.replace("\\ ", " ") for w in words[1:] if w != ":"]
        made = self.stamp.stat().st_mtime_ns
        return all(p.exists() and p.stat().st_mtime_ns < made for p in inputs)

    def make(self) -> None:
        self.stamp.unlink(missing_ok=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        started = time.time_ns()
        print(f"building {self.output.relative_to(ROOT)}\n", end="", flush=True)
        run(self.command)
        if self.isa not in ("", "baseline") and not SANITIZE:
            check_no_shared_code(self.output, self.isa)
        self.stamp.write_text(self.key)
        os.utime(self.stamp, ns=(started, started))  # an edit during the compilation makes it stale


def flags_and_folder() -> tuple[list[str], Path]:
    """More compiler flags, and where the objects go."""
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    if SANITIZE:
        extra += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
    return extra, ROOT / "build" / "-".join(["native", *SANITIZE.split(",")]).rstrip("-")


def build_store() -> Path:
    """Compile the store's slot table if it is out of date; its path."""
    cxx = compiler()
    extra, out = flags_and_folder()
    includes = [sysconfig.get_path("include"), str(Path(find_spec("pybind11").origin).parent / "include")]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    source, library = ROOT / "csrc" / "store" / "module.cpp", out / f"_store{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [*cxx, *COMMON, "-O3", "-ffp-contract=off", *extra, *(f for i in includes for f in ("-isystem", i)), *shared]
    command += ["-MMD", "-MF", str(library.with_suffix(".d")), str(source.relative_to(ROOT)), "-o", str(library)]
    target = Target(library, command, [source], f"{run([*cxx, '--version']).splitlines()[0]}; pybind11 {version('pybind11')}")
    if not target.fresh():
        target.make()
    return library


def build_library() -> Path:
    """Compile and link what is out of date; the path of the library."""
    import fcntl

    torch = Path(find_spec("torch").origin).parent
    cxx = compiler()
    key = f"{run([*cxx, '--version']).splitlines()[0]}; torch {version('torch')}"
    extra, out = flags_and_folder()

    def compiled(source: Path, flags: list[str], isa: str = "") -> Target:
        obj = out / "-".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
        obj = obj.with_name(f"{obj.name}{isa and '.'}{isa}.o")
        command = [*cxx, *COMMON, *flags, *extra, "-MMD", "-c", str(source.relative_to(ROOT)), "-o", str(obj)]
        return Target(obj, command, [source], key, isa)

    try:
        nvcc = find_nvcc()
        cuda = [] if nvcc is None else ["-L" + str(cudart_folder(nvcc)), "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
        gpu = [] if nvcc is None else [nvcc, *CUDA_KERNEL, *gpu_flags(nvcc)]
        nvcc_key = nvcc and run([nvcc, "--version"])
    except CompileError as e:
        if CUDA == "1":
            raise
        print(f"memcore: building without CUDA kernels: {e}", file=sys.stderr)
        nvcc, cuda = None, []

    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if nvcc else ():
        obj = out / f"cuda-{source.stem}.cu.o"
        command = [*gpu, "-MMD", "-MF", str(obj.with_suffix(".d")), "-c", str(source.relative_to(ROOT)), "-o", str(obj)]
        objects.append(Target(obj, command, [source], f"{key}\n{nvcc_key}"))
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        if source.parent.name == "store" or (source.parent.name == "cuda" and not nvcc):
            continue
        if source.stem.endswith("_kernel"):
            objects += [compiled(source, [*KERNEL, *flags, f"-DMC_ISA={isa}"], isa) for isa, flags in ISAS.items()]
        else:
            objects.append(compiled(source, [*glue_flags(), "-isystem", str(torch / "include")]))

    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,--as-needed"]
    if nvcc:
        shared.append("-Wl,--exclude-libs,libcudart_static.a")  # the runtime is ours alone: another version may be in the process
    if SANITIZE:
        shared = ["-shared"]  # the sanitizer's runtime is preloaded
    library = out / "_C.abi3.so"
    link = [*cxx, *shared, *extra, *(str(t.output) for t in objects), f"-L{torch / 'lib'}", "-ltorch_cpu", *cuda, "-o", str(library)]
    linked = Target(library, link, [t.output for t in objects], key)

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stale = [t for t in objects if not t.fresh()]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(Target.make, stale))
        if not linked.fresh():
            linked.make()
    return library


def tell(reason: str) -> None:
    print(f"memcore: building without the native library: {reason}", file=sys.stderr)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            library = build_store() if ext.name == "memcore._store" else build_library()
        except CompileError as e:
            for old in (target, ROOT / "memcore" / target.name):  # rather none than one that does not fit
                old.unlink(missing_ok=True)
            if NATIVE == "1":
                raise
            tell(str(e))
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


if NATIVE not in ("auto", "0", "1"):
    sys.exit(f"memcore: MEMCORE_BUILD_NATIVE must be one of auto, 0, 1, got {NATIVE!r}")
if CUDA not in ("auto", "0", "1"):
    sys.exit(f"memcore: MEMCORE_CUDA must be one of auto, 0, 1, got {CUDA!r}")
reason = why_not_native()
if reason and NATIVE == "1":
    sys.exit(f"memcore: the native library cannot be built: {reason}")
if reason and NATIVE == "auto":
    tell(reason)
storeless = reason or why_no_store()
if storeless and not reason:
    print(f"memcore: building without the store's slot table, which runs in Python: {storeless}", file=sys.stderr)
optional = NATIVE == "auto"

setup(
    packages=[
        *find_packages(include=["memcore", "memcore.*"]),
        *(f"memcore.{top}" for top in ("kernels", "bench")),
        *(f"memcore.{top}.{p}" for top in ("kernels", "bench") for p in find_packages(top)),
    ],
    # `kernels` and `bench` have no __init__.py at their top: as folders they never hide packages of these names.
    package_dir={"memcore": "memcore", "memcore.kernels": "kernels", "memcore.bench": "bench"},
    ext_modules=[
        *([] if reason else [Extension("memcore._C", [], py_limited_api=True, optional=optional)]),
        *([] if storeless else [Extension("memcore._store", [], optional=optional)]),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if storeless and not reason else {},
)
