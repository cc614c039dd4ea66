"""pytest-benchmark of usage_update: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_usage_update = benchmark_op("usage_update")
