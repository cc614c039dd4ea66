"""pytest-benchmark of content_addressing: `pytest bench --benchmark-only`."""

from memcore.bench.cases import benchmark_op

test_content_addressing = benchmark_op("content_addressing")
