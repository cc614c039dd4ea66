"""Data that a test cannot do without."""

import os

import pytest

from memcore import data


def need(loader, *args, **options):
    """What `loader` gives; without the data a skip, or a failure where MEMCORE_REQUIRE_DATA=1."""
    try:
        return loader(*args, **options)
    except data.DataNotFound as e:
        if os.environ.get("MEMCORE_REQUIRE_DATA") == "1":
            pytest.fail(str(e))
        pytest.skip(str(e))
