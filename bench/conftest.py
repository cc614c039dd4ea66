"""`pytest bench` collects the bench_<op>.py files."""


def pytest_configure(config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
