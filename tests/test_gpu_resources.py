"""The gates on what compilers make of the GPU kernels: no spill on any architecture, and nothing but what results/gpu/resources.json says.

Each run compiles every Triton kernel in its heaviest form for one architecture and reads all CUDA kernels of the library (of one that holds PTX
alone, the float32 ones); --slow compiles all forms for all.
"""

import ctypes
import os
import re
import subprocess
from importlib import import_module

import pytest

import gpu_resources as resources
import shim_build  # gpu_resources knows where
from gpu_resources import ARCHES, FORMS, GEOMETRIES, LIMITS, NVIDIA, ROOT, blocks, complaints, heaviest

needs_cuda = pytest.mark.skipif(bool(resources.missing_cuda()), reason=resources.missing_cuda() or "-")
needs_triton = pytest.mark.skipif(bool(resources.missing_triton()), reason=resources.missing_triton() or "-")
needs_shim = pytest.mark.skipif(bool(resources.missing_shim()), reason=resources.missing_shim() or "-")


@pytest.fixture(scope="module")
def table():
    return resources.read()


def same(table, compiler: str) -> bool:
    """Another version makes other code: then only spills are judged."""
    return table["versions"][compiler] == resources.versions()[compiler]


def built_for() -> set[str]:
    """What the library holds at least, if it was built under this environment: TORCH_CUDA_ARCH_LIST, or everything."""
    wanted = re.findall(r"\d+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(".", ""))
    return {f"sm_{arch}" for arch in wanted} & set(NVIDIA) or set(NVIDIA)


def kernels_of(table) -> set[str]:
    """The table's CUDA kernels that are judged: of PTX alone those in float32."""
    names = table["cuda"].keys()
    return {n for n in names if not resources.ptx_alone() or re.fullmatch(r"\w+ float32", n)}


@needs_cuda
def test_cuda(table):
    found = resources.cuda()
    wrong = [c for name, by in found.items() for c in complaints(name, by, table["cuda"].get(name), same(table, "nvcc"))]
    assert not wrong, "\n".join(wrong)
    assert found.keys() == kernels_of(table) and all(by.keys() >= built_for() for by in found.values())


@needs_cuda
@needs_shim
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cuda_launches(table, geometry):
    """Blocks have the shared memory the table says, no more than there is, and run: at least one on a multiprocessor."""
    for arch in NVIDIA:
        found = resources.cuda_launches(arch, geometry)
        assert {k: list(v) for k, v in found.items()} == table["launches"][f"{arch} {geometry}"], f"{arch} (make gpu-tables)"
        for name, (threads, shared) in found.items():
            assert blocks(arch, threads, table["cuda"][name][arch]["registers"], shared) >= 1, f"{name} on {arch}"


def test_no_table_is_written_of_a_part():
    assert resources.partial({*NVIDIA, "sm_87"}) == ""
    assert resources.partial({"sm_80", "sm_90"}) == "the library has no code for sm_100, sm_120: build it without TORCH_CUDA_ARCH_LIST"
    assert "sm_80" in resources.partial(set())  # PTX alone


def kernels_of_the_package() -> set[str]:
    """Names of all Triton kernels: jit functions whose name has "kernel" in it, by the name they are defined under."""
    modules = ["_triton", *(f"{p.parent.name}.triton" for p in (ROOT / "kernels").glob("*/triton.py"))]
    found = [f for m in modules for f in vars(import_module(f"memcore.kernels.{m}")).values() if hasattr(f, "arg_names")]
    return {f.fn.__name__ for f in found if "kernel" in f.fn.__name__}


@needs_triton
def test_triton_table_holds_every_kernel(table):
    made = {k.label for dtype, geometry in FORMS for k in resources.triton_kernels(dtype, geometry)}
    assert made == table["triton"].keys(), "make gpu-tables"
    assert kernels_of_the_package() == heaviest(table["triton"]).keys(), "a kernel that no sample launches"


@pytest.fixture(scope="module")
def float32():
    return {k.label: k for dtype, geometry in FORMS if dtype == "float32" for k in resources.triton_kernels(dtype, geometry)}


# Triton takes half a minute for an architecture; CUDA's part judges the oldest of NVIDIA's.
USUAL = ("sm_90",)


@needs_triton
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[] if arch in USUAL else [pytest.mark.slow]) for arch in ARCHES])
def test_triton(table, float32, arch):
    wrong = []
    for label in heaviest(table["triton"]).values():
        if label in float32:  # else the test above fails
            found = {arch: resources.triton_usage(float32[label], arch)}
            wrong += complaints(label, found, table["triton"][label], same(table, "triton"))
    assert not wrong, "\n".join(wrong)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype, geometry", FORMS)
def test_triton_all(table, dtype, geometry):
    wrong = []
    for kernel in resources.triton_kernels(dtype, geometry):
        found = {arch: resources.triton_usage(kernel, arch) for arch in ARCHES}
        wrong += complaints(kernel.label, found, table["triton"].get(kernel.label), same(table, "triton"))
    assert not wrong, "\n".join(wrong)


@needs_triton
def test_a_spilling_kernel_is_told(table, float32):
    label = heaviest(table["triton"])["content_addressing_bwd_kernel"]
    kernel = float32[label]._replace(options=lambda nvidia: {"num_warps": float32[label].warps, "maxnreg": 32})
    (told, *_) = complaints(label, {"sm_80": resources.triton_usage(kernel, "sm_80")}, table["triton"][label])
    assert "bytes of stack: registers are spilled" in told


def test_growth_and_a_stale_table_are_told():
    was = {"sm_80": {"registers": 40, "stack": 0, "shared": 0}}
    assert complaints("k", was, was) == []
    assert complaints("k", {"sm_80": {"registers": 41, "stack": 0, "shared": 0}}, was) == ["k on sm_80: registers 40 -> 41"]
    assert complaints("k", {"sm_80": {"registers": 41, "stack": 0, "shared": 0}}, was, growth=False) == []
    assert complaints("k", {"sm_80": {"registers": 40, "stack": 8, "shared": 0}}, was, growth=False) == ["k on sm_80: 8 bytes of stack: registers are spilled"]
    assert "write the table again" in complaints("k", {"sm_80": {"registers": 39, "stack": 0, "shared": 0}}, was)[0]
    assert complaints("k", was, None) == ["k: not in resources.json (make gpu-tables)"]


def test_the_page_is_that_of_the_table(table):
    assert resources.PAGE.read_text(encoding="utf-8") == resources.page(table), "make gpu-tables"


OCCUPANCY = """
#include <cuda_occupancy.h>
extern "C" int occupancy(int major, int warps, long shared_sm, long shared_block, int threads, int registers, long shared) {
  cudaOccDeviceProp p;
  p.computeMajor = major, p.computeMinor = 0, p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = 32 * warps;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32, p.sharedMemPerBlock = 48 * 1024, p.sharedMemPerMultiprocessor = shared_sm;
  p.numSms = 1, p.sharedMemPerBlockOptin = shared_block, p.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes f;
  f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0, f.partitionedGCConfig = PARTITIONED_GC_OFF;
  f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = shared, f.numBlockBarriers = 1;
  cudaOccDeviceState s;
  cudaOccResult r;
  return cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, shared) == CUDA_OCC_SUCCESS ? r.activeBlocksPerMultiprocessor : -1;
}
"""


@needs_cuda
@needs_shim
def test_occupancy_is_the_toolkits(tmp_path):
    """`blocks` against cuda_occupancy.h, which needs no GPU."""
    home = subprocess.run(["nvcc", "--dryrun", "-c", str(ROOT / "csrc/cuda/runtime.cu")], capture_output=True, text=True).stderr
    include = next(line.partition("=")[2] for line in home.splitlines() if line.startswith("#$ INCLUDES=")).split()[0].strip('"')
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    command = [*shim_build.compiler(), "-shared", "-fPIC", "-O1", include, str(tmp_path / "occupancy.cpp"), "-o", str(tmp_path / "occupancy.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cuda_occupancy.h" in done.stderr and "No such file" in done.stderr:
        pytest.skip("the toolkit has no cuda_occupancy.h")
    assert done.returncode == 0, done.stderr
    theirs = ctypes.CDLL(str(tmp_path / "occupancy.so")).occupancy
    theirs.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    for arch, limit in LIMITS.items():
        for threads in (32, 64, 96, 256, 512, 1024):
            for registers in (16, 32, 40, 64, 72, 128, 168, 255):
                for shared in (0, 1000, 20 << 10, 33 << 10, 50 << 10, limit.block, limit.block + 1):
                    if threads * registers > 65536:
                        continue
                    got = blocks(arch, threads, registers, shared)
                    wanted = theirs(int(arch[3:]) // 10, limit.warps, limit.shared, limit.block, threads, registers, shared)
                    assert got == max(wanted, 0), (arch, threads, registers, shared)
