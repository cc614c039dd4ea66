import pytest
from stores import KINDS, kind_of_store


@pytest.fixture(params=KINDS)
def Store(request):
    """The class of stores of each kind in turn."""
    with kind_of_store(request.param) as cls:
        yield cls
