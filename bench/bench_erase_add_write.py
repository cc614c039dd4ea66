"""pytest-benchmark of erase_add_write: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_erase_add_write = benchmark_op("erase_add_write")
