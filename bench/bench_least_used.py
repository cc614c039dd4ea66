"""pytest-benchmark of least_used: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_least_used = benchmark_op("least_used")
