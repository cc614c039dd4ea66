"""pytest-benchmark of circular_shift: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_circular_shift = benchmark_op("circular_shift")
