"""pytest-benchmark of interpolate: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_interpolate = benchmark_op("interpolate")
