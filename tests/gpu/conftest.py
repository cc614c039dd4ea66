"""Fixtures of the tests on a real GPU. Each test also runs once on the CPU, with little, so that its first GPU finds no mistake in the test itself."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products of the reference; read when CUDA starts

HERE = Path(__file__).resolve().parent
for p in (HERE, HERE.parent):
    if str(p) not in sys.path:
        sys.path.insert(0, str(p))

DEVICES = [pytest.param("cpu", id="dry"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _unpoisoned(_house):
    """TESTS_POISON=0 leaves fresh memory alone: compute-sanitizer's initcheck finds what is read before it is written."""
    if os.environ.get("TESTS_POISON") == "0":
        torch.utils.deterministic.fill_uninitialized_memory = False
