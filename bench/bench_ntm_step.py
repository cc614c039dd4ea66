"""pytest-benchmark of chained NTM steps, forward and backward through time: `pytest bench --benchmark-only`."""

import pytest

from memcore.bench.cases import STEPS
from memcore.bench.measure import threads
from memcore.bench.runner import step_variants


@pytest.mark.parametrize("variant", ["memcore", "eager"])
@pytest.mark.parametrize("size", ["small", "mid"])
def test_ntm_step(benchmark, size: str, variant: str) -> None:
    """A chain of ntm_step against tuned eager PyTorch."""
    benchmark.group = f"ntm_step {STEPS[size]}"
    with threads(1):
        made = step_variants(STEPS[size], [variant])[variant]
        benchmark.pedantic(made.both, rounds=5, warmup_rounds=1)
