"""pytest-benchmark of split_interface: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_split_interface = benchmark_op("split_interface")
