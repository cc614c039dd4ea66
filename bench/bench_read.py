"""pytest-benchmark of read: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_read = benchmark_op("read")
