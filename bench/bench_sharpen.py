"""pytest-benchmark of sharpen: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_sharpen = benchmark_op("sharpen")
