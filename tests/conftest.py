"""What every test gets: seeds, one thread, uninitialised memory full of NaN, and the operators' backends."""

import gc
import os
from pathlib import Path

import hypothesis
import pytest
import torch

_data = Path(__file__).resolve().parents[2] / "shared" / "data"
if "MEMCORE_DATA" not in os.environ and _data.is_dir():
    os.environ["MEMCORE_DATA"] = str(_data)

from memcore import _backend  # noqa: E402  (MEMCORE_DATA comes first)
from paths import PATHS, use_path  # noqa: E402

if _backend.native is not None:
    torch.ops.memcore._set_allocate_by_aten(True)  # what the kernels allocate is filled, too; processes of their own do as users do

hypothesis.settings.register_profile("memcore", deadline=None, derandomize=True, max_examples=12, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "memcore"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow or -m slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "growth: measures how the process grows; its file comes first")


def pytest_collection_modifyitems(config, items):
    # Emulators and GPU compilers leave a heap full of holes, in which a leak would not be seen: growth is measured before. Then they, which take the
    # longest, and at last the many short files, which leave no worker idle for long.
    early = {item.path for item in items if item.get_closest_marker("growth")}
    long = ("_on_cpu", "gpu", "test_contract_")
    items.sort(key=lambda item: 0 if item.path in early else 1 if any(name in item.nodeid for name in long) else 2)
    if not config.getoption("--slow") and not config.getoption("markexpr"):
        kept: dict[bool, list] = {True: [], False: []}
        for item in items:
            kept[item.get_closest_marker("slow") is None].append(item)
        config.hook.pytest_deselected(items=kept[False])
        items[:] = kept[True]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session):
    _settle()  # thousands of collected tests


def pytest_sessionfinish(session):
    gc.unfreeze()


def _settle():
    """Full collections no longer walk through what is there by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What the files before left behind (compiled graphs, caches) slows nobody down."""
    _settle()


@pytest.fixture(autouse=True)
def _house():
    """Fixed seed, one thread, NaN in every fresh tensor."""
    torch.default_generator.manual_seed(0)  # of the CPU alone: `torch.manual_seed` writes down a stack trace for every kind of device
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if not torch.are_deterministic_algorithms_enabled():  # setting it is slow
        torch.use_deterministic_algorithms(True)


@pytest.fixture(params=PATHS)
def backend(request):
    """Every implementation of the operators in turn; its name."""
    with use_path(request.param):
        yield request.param


@pytest.fixture(params=PATHS[-1:])
def operators(request):
    """The registered operators in their best implementation; its name."""
    with use_path(request.param):
        yield request.param


@pytest.fixture(params=["reference", PATHS[-1]])
def two_backends(request):
    """The reference and the registered operators in their best implementation; its name."""
    with use_path(request.param):
        yield request.param
