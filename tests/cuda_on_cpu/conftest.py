"""The fixture `backend` of tests/conftest.py, here: the CUDA kernels on CPU tensors."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for p in (HERE, HERE.parent, HERE.parent / "kernels"):
    if str(p) not in sys.path:
        sys.path.insert(0, str(p))

import shim_build  # noqa: E402


def pytest_collection_modifyitems(items):
    if shim_build.compiler() is None:
        for item in items:
            if HERE in Path(item.fspath).parents:
                item.add_marker(pytest.mark.skip(reason="no C++ compiler (c++, g++, clang++ or $CXX) to build the CUDA kernels for the CPU"))


@pytest.fixture
def backend():
    import cuda_shim

    with cuda_shim.use():
        yield "cuda"
