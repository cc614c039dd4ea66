# Every target does its own set-up on a fresh machine: .venv, torch, the package, its native library where a C++ compiler is.
#
#   make test [ARGS="tests/kernels -k read"]     the test suite; MEMCORE_DATA=DIR for the tests on real data
#   make demo | bench | test-slow | test-asan | gpu | gpu-sanitize | gpu-tables | build | clean
#
# WORKERS is the number of processes that test side by side (default: one a core, at most 8; 0: none beside pytest itself).
# PYTHON, VENV and TORCH choose the interpreter, the environment's folder and what pip gets as torch, for example
#   make test TORCH="torch==2.13.0 --index-url ADDRESS"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= auto
SANITIZE ?= address,undefined

PY := $(VENV)/bin/python
READY := $(VENV)/memcore.ready
SPREAD := --maxprocesses=8 --dist=loadfile --no-loadscope-reorder # a file's tests share what it compiles; tests/conftest.py orders them

.DEFAULT_GOAL := help
.PHONY: help test demo bench build test-slow test-asan gpu gpu-sanitize gpu-tables clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit("memcore: needs Python >= 3.10 (make PYTHON=...)" if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'from importlib.util import find_spec; raise SystemExit(find_spec("torch") is None)' || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install --no-build-isolation -e ".[test]"
	@touch $@

build: $(READY)
	@$(PY) setup.py -q build_ext --inplace

test: build
	$(PY) -m pytest -n $(WORKERS) $(SPREAD) $(ARGS)

test-slow: build
	$(PY) -m pytest -m slow -n $(WORKERS) $(SPREAD) $(ARGS)

# The tables of what compilers make of the GPU kernels; needs nvcc, triton and a C++ compiler, no GPU.
gpu-tables: build
	$(PY) tests/gpu_resources.py

# On a machine with a GPU: its tests, then the benchmark, into one file to send back.
gpu: build
	$(PY) tests/gpu/report.py --out gpu-report.json $(ARGS)

# The kernels under NVIDIA's compute-sanitizer. Every allocation is its own, so that the first byte past a tensor is out of bounds.
gpu-sanitize: build
	for tool in memcheck racecheck synccheck initcheck; do \
	  echo "== $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 TESTS_POISON=0 compute-sanitizer --tool $$tool --error-exitcode 9 --target-processes all \
	  $(PY) -m pytest -q -p no:cacheprovider tests/gpu/test_gpu_contract.py -m gpu -k 'test_contract and not auto and float32' $(ARGS) || exit 1; \
	done

demo: build
	$(VENV)/bin/memcore demo $(ARGS)

bench: build
	$(VENV)/bin/memcore bench $(or $(ARGS),roofline ops step train growth)

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package that the bare `pytest` command
# (no checkout on sys.path) finds first. The runtimes are preloaded because Python itself is not instrumented. The searches of all of
# MNIST are left out, which take too long so.
test-asan: $(READY)
	@rm -rf build/asan
	@MEMCORE_BUILD_NATIVE=1 MEMCORE_SANITIZE=$(SANITIZE) $(PY) setup.py -q build --build-lib build/asan
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MEMCORE_BACKEND=native \
	$(VENV)/bin/pytest -o pythonpath=build/asan -p no:cacheprovider tests/kernels tests/test_contract_numerics.py \
	-k '(kernels or forward or gradient or strides or threads or empty) and not nearest_digit' $(ARGS)

clean:
	rm -rf build dist *.egg-info memcore/_C*.so memcore/_store*.so .pytest_cache .hypothesis .benchmarks
	find memcore kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
