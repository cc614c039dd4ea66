"""pytest-benchmark of ntm_addressing: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_ntm_addressing = benchmark_op("ntm_addressing")
