"""pytest-benchmark of lrua_write: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_lrua_write = benchmark_op("lrua_write")
