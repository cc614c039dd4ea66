"""What is installed and how: optional parts missing, names not hidden, wheel contents, the build's switches and increments."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import memcore
from memcore import _backend

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = ("MEMCORE_BACKEND", "MEMCORE_BUILD_NATIVE", "MEMCORE_CACHE_MB", "MEMCORE_CPU_ISA", "MEMCORE_SANITIZE", "CXX", "CXXFLAGS", "PYTHONPATH")
needs_native = pytest.mark.skipif(_backend.native is None, reason="native library not built")


def python(*args: str, cwd: Path = ROOT, fails: bool = False, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


READ = "memcore.functional.read(torch.ones(1, 2, 3), torch.ones(1, 1, 2))"


def test_works_without_native_library_and_triton_and_says_so_once():
    done = python(
        "-c",
        "import sys\nsys.modules['memcore._C'] = sys.modules['triton'] = None\nimport memcore, torch\n"
        f"for _ in range(3): r = {READ}\nprint(r.tolist())",
    )
    assert done.stdout == "[[[2.0, 2.0, 2.0]]]\n"
    assert done.stderr.count("memcore runs on plain PyTorch") == 1
    assert "pip install --no-build-isolation" in done.stderr


def test_native_backend_asked_for_but_missing():
    code = f"import sys\nsys.modules['memcore._C'] = None\nimport memcore, torch\n{READ}"
    done = python("-c", code, fails=True, MEMCORE_BACKEND="native")
    assert "RuntimeError: memcore.read: backend 'native' is not available for cpu tensors" in done.stderr


def test_unknown_backend_in_the_environment():
    assert "memcore: MEMCORE_BACKEND must be one of" in python("-c", f"import memcore, torch\n{READ}", fails=True, MEMCORE_BACKEND="fast").stderr


def test_other_packages_named_kernels_and_bench_are_not_hidden(tmp_path):
    for name in ("kernels", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("owner = 'someone else'")
    code = "import memcore, kernels, bench\nimport memcore.kernels.read as r\nprint(kernels.owner, bench.owner, r.__name__)"
    assert python("-c", code, PYTHONPATH=str(tmp_path)).stdout == "someone else someone else memcore.kernels.read\n"


def sources(target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("memcore", "kernels", "bench", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> str:
    """A PYTHONPATH under which torch is not importable."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    return str(folder)


WHEEL = "from setuptools import build_meta; build_meta.build_wheel('dist')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, without_torch):
    """A wheel built where torch is absent, and what the build said."""
    tree = sources(tmp_path_factory.mktemp("wheel"))
    said = python("-c", WHEEL, cwd=tree, PYTHONPATH=without_torch)
    (path,) = (tree / "dist").glob("*.whl")
    return path, said.stderr


def test_wheel_without_torch_is_pure_python_and_tells_how_to_get_more(wheel):
    path, said = wheel
    assert path.name == f"memcore-{memcore.__version__}-py3-none-any.whl"
    assert "building without the native library: torch is not importable" in said and "--no-build-isolation" in said


def test_wheel_holds_the_operators_inside_memcore_alone(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    assert {n.partition("/")[0] for n in names} == {"memcore", f"memcore-{memcore.__version__}.dist-info"}
    shipped = {n for n in names if n.endswith(".py")}
    for folder, inside in (("memcore", "memcore"), ("kernels", "memcore/kernels"), ("bench", "memcore/bench")):
        have = {f"{inside}/{p.relative_to(ROOT / folder).as_posix()}" for p in (ROOT / folder).rglob("*.py") if "results" not in p.parts}
        assert have and have <= shipped, have - shipped
    assert "memcore/py.typed" in names
    assert "memcore/kernels/__init__.py" not in names and "memcore/bench/__init__.py" not in names


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel[0]) as z:
        info = f"memcore-{memcore.__version__}.dist-info/"
        meta = HeaderParser().parsestr(z.read(info + "METADATA").decode())
        assert "memcore = memcore.cli:main" in z.read(info + "entry_points.txt").decode()
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == ("memcore", memcore.__version__, ">=3.10")
    needed = {r for r in meta.get_all("Requires-Dist") if "extra ==" not in r}
    assert needed == {"torch>=2.11", "numpy"}


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel[0]).extractall(tmp_path / "site")
    code = f"import memcore, torch, memcore.kernels.read\nprint({READ}.sum().item(), memcore.__file__)"
    out = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).stdout
    assert out.split() == ["6.0", str(tmp_path / "site" / "memcore" / "__init__.py")]


def test_installed_version_is_the_package_version():
    try:
        assert version("memcore") == memcore.__version__
    except PackageNotFoundError:
        pytest.skip("memcore is not installed")


def test_build_switch(tmp_path, without_torch):
    tree = sources(tmp_path)
    asked = python("setup.py", "--version", cwd=tree, fails=True, PYTHONPATH=without_torch, MEMCORE_BUILD_NATIVE="1").stderr
    assert "cannot be built: torch is not importable" in asked
    wrong = python("setup.py", "--version", cwd=tree, fails=True, MEMCORE_BUILD_NATIVE="yes").stderr
    assert "MEMCORE_BUILD_NATIVE must be one of auto, 0, 1, got 'yes'" in wrong
    off = python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, MEMCORE_BUILD_NATIVE="0", CXX="/nowhere/c++")
    assert not off.stderr


def test_compiler_missing_or_failing(tmp_path):
    tree = sources(tmp_path)
    stale = tree / "memcore" / "_C.abi3.so"
    stale.write_text("from an older build")
    said = python("-c", WHEEL, cwd=tree, CXX="/nowhere/c++").stderr
    assert "building without the native library: /nowhere/c++: No such file" in said
    (built,) = (tree / "dist").glob("*.whl")
    assert not stale.exists() and not any("_C" in n for n in zipfile.ZipFile(built).namelist())
    build = ("setup.py", "-q", "build_ext", "--inplace")
    assert "/nowhere/c++: No such file" in python(*build, cwd=tree, fails=True, CXX="/nowhere/c++", MEMCORE_BUILD_NATIVE="1").stderr


FAKE_COMPILER = """#!{python}
import sys
from pathlib import Path
args = sys.argv[1:]
if args == ["--version"]:
    sys.exit(print("fake 1.0"))
out = Path(args[args.index("-o") + 1])
out.write_text("object")
if "-c" in args:
    source = args[args.index("-c") + 1]
    header = "csrc/cpu/isa.h" if Path(source).stem == "isa" else ""
    out.with_suffix(".d").write_text(f"{{out}}: {{source}} {{header}}\\n")
"""


def test_only_what_changed_is_built_again(tmp_path):
    tree = sources(tmp_path / "tree")
    (tree / "csrc" / "cpu" / "extra_kernel.cpp").touch()
    tools = tmp_path / "tools"  # the only folder on PATH: no nm, which could not read these objects
    tools.mkdir()
    (tools / "cxx").write_text(FAKE_COMPILER.format(python=sys.executable))
    (tools / "cxx").chmod(0o755)

    def built(**env: str) -> set[str]:
        out = python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, CXX=str(tools / "cxx"), PATH=str(tools), **env).stdout
        return {line.removeprefix("building build/native").lstrip("/") for line in out.splitlines() if line.startswith("building build/")}

    first = built()
    assert {"cpu-isa.o", "python.o", "cpu-extra_kernel.baseline.o", "_C.abi3.so"} <= first
    assert (tree / "memcore" / "_C.abi3.so").read_text() == "object"
    assert built() == set()

    (tree / "csrc" / "cpu" / "extra_kernel.cpp").write_text("// changed")
    assert built() == {n for n in first if n.startswith("cpu-extra_kernel.")} | {"_C.abi3.so"}
    (tree / "csrc" / "cpu" / "isa.h").write_text("// changed")
    assert built() == {"cpu-isa.o", "_C.abi3.so"}
    assert built(CXXFLAGS="-g") == first
    sanitized = built(MEMCORE_SANITIZE="address", CXXFLAGS="-g")
    assert sanitized == {f"-address/{n}" for n in first}


@needs_native
def test_instruction_set_from_the_environment():
    code = "import memcore, torch\nprint(torch.ops.memcore._cpu_isa())"
    assert python("-c", code, MEMCORE_CPU_ISA="baseline").stdout == "baseline\n"
    said = python("-c", code, fails=True, MEMCORE_CPU_ISA="sse9").stderr
    usable = re.escape(_backend.describe()["cpu_isa_available"][-1])
    assert re.search(f"RuntimeError: memcore: MEMCORE_CPU_ISA must be one of auto, baseline.*{usable} on this machine, got 'sse9'", said)


@needs_native
def test_instruction_set_from_python():
    import torch

    ops = torch.ops.memcore
    before = ops._cpu_isa()
    try:
        for isa in ops._cpu_isas().split(","):
            ops._set_cpu_isa(isa)
            assert ops._cpu_isa() == isa == _backend.describe()["cpu_isa"]
        with pytest.raises(RuntimeError, match="^memcore: the instruction set must be one of auto, baseline.*got 'mmx'"):
            ops._set_cpu_isa("mmx")
    finally:
        ops._set_cpu_isa(before)


@needs_native
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_native_library_uses_stable_interfaces_alone():
    library = Path(_backend.native.__file__)
    assert library.name == "_C.abi3.so"
    out = subprocess.run(["nm", "-DC", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    wanted = [line.split(maxsplit=1)[1] for line in out.splitlines()]
    assert [s for s in wanted if s.startswith("Py")] == ["PyModule_Create2"]
    assert not [s for s in wanted if re.match(r"(at|c10|caffe2|torch)::", s)]
