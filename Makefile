# Every target sets itself up: a .venv pinned by constraints.txt, remade when its inputs change.
#
#   PYTHON=python3.12   the interpreter the .venv is made from; `make gpu PYTHON=python3` uses that one as it is
#   TORCH_INDEX=URL     the package index torch comes from, remembered by the .venv; TORCH_INDEX= goes back to the default
#   ARGS="-k matching"  further arguments for pytest, or for `make bench` of `dsd-fast bench`
#   SUITE=match         the suite that `make bench` runs
#   CASES='tune/*'       with `make gpu`: the suites' cases of such names instead of its steps
#   PROCESSES=2         processes that share the tests, each with one thread
#
# One run has all tests: those marked `alone` (of memory, of time, of kills by the clock) make the other processes wait.
# `make test-oldest` runs what computes under the oldest versions that pyproject.toml admits, in a .venv-oldest, and
# `make test-newest` the main calls (marked `newest`) under the newest, in a .venv-newest as new as its making. Of the GPU
# targets, `gpu` has the steps that `python -m benchmarks.gpu --plan` shows, `gpu-full` all benchmarks (interrupted, it goes
# on where it was), and `gpu-sanitize` runs the tests marked `sanitizer` under compute-sanitizer.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUITE ?= match
PROCESSES ?= 2
PYTEST := -m pytest -n $(PROCESSES) --dist worksteal
STAMP := $(VENV)/installed

# Oldest versions: what holds the arithmetic, and the tests of it. Left out is what no version changes: the compiled library,
# which is one binary for all (test_cross_attention_score.py calls it), the mini model's pictures, and of the interpreted
# kernels all but attention's. The rest of the house has the pinned versions alone.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/installed
OLDEST_TESTS := tests/kernels tests/unet tests/models tests/training --ignore=tests/models/mini \
  $(addprefix --ignore=tests/kernels/test_,cpu_library.py elementwise.py guarded.py)

# Newest versions: of torch the newest build for CPUs, since the ordinary one brings gigabytes of CUDA.
NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/installed
NEWEST_INDEX ?= https://download.pytorch.org/whl/cpu
# The ordinary index may have that build, too, so one that does not answer is not waited for.
NEWEST_OPTIONS = --retries 1 --extra-index-url $(NEWEST_INDEX)

.PHONY: install install-oldest install-newest demo test test-oldest test-newest lint bench gpu gpu-full gpu-sanitize force

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/dsd-fast demo

test: $(STAMP)
	$(BIN)/python $(PYTEST) $(ARGS)

install-oldest: $(OLDEST_STAMP)

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python $(PYTEST) $(OLDEST_TESTS) $(ARGS)

install-newest: $(NEWEST_STAMP)

test-newest: $(NEWEST_STAMP)
	$(NEWEST)/bin/python $(PYTEST) -m newest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/dsd-fast bench $(SUITE) $(ARGS)
	$(BIN)/dsd-fast bench-docs

# A given interpreter has its own torch and perhaps no network: nothing is installed into it.
ifeq ($(origin PYTHON),command line)
GPU := $(PYTHON)
else
GPU := $(BIN)/python
gpu gpu-full gpu-sanitize: $(STAMP)
endif

gpu:
	$(GPU) -m benchmarks.gpu $(if $(CASES),--cases '$(CASES)') -- $(ARGS)

gpu-full:
	$(GPU) -m benchmarks.gpu --full

gpu-sanitize:
	$(GPU) -m benchmarks.gpu --sanitize -- $(ARGS)

# An installed torch meets the pin whatever index it came from, so another index means a new environment.
INSTALLED_INDEX := $(shell cat $(STAMP) 2>/dev/null)
TORCH_INDEX ?= $(INSTALLED_INDEX)
ifneq ($(TORCH_INDEX),$(INSTALLED_INDEX))
$(STAMP): VENV_OPTIONS := --clear
$(STAMP): force
endif
ifneq ($(TORCH_INDEX),$(shell cat $(OLDEST_STAMP) 2>/dev/null))
$(OLDEST_STAMP): VENV_OPTIONS := --clear
$(OLDEST_STAMP): force
endif
ifneq ($(TORCH_INDEX),)
# torch alone: the rest, its NVIDIA packages included, comes from the ordinary index in the last step.
TORCH_OPTIONS := --no-deps --index-url $(TORCH_INDEX)
endif

$(STAMP): CONSTRAINTS := constraints.txt
$(STAMP): WANTED := -e ".[dev]"
$(OLDEST_STAMP): CONSTRAINTS := constraints-oldest.txt
$(OLDEST_STAMP) $(NEWEST_STAMP): WANTED := -e ".[triton]" pytest pytest-timeout pytest-xdist hypothesis scikit-learn

# What is compiled is made anew when its source changes.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/cpu/*)
$(STAMP): constraints.txt $(SOURCES)
$(OLDEST_STAMP): constraints-oldest.txt $(SOURCES)
define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "dsd_fast needs Python 3.11 or later; choose one with PYTHON=..." >&2; exit 1; }
endef
$(STAMP) $(OLDEST_STAMP):
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV_OPTIONS) $(@D)
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) setuptools wheel
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) $(TORCH_OPTIONS) $(shell grep '^torch==' $(CONSTRAINTS))
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) --no-build-isolation $(WANTED)
	@echo "$(TORCH_INDEX)" > $@

$(NEWEST_STAMP): $(SOURCES)
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --upgrade setuptools wheel
	version=$$($(@D)/bin/python -m pip index versions torch $(NEWEST_OPTIONS) | \
	  awk -v RS='[ ,\n]+' '/[+]cpu$$/ && !seen++'); \
	test -n "$$version" || { echo "no build of torch for CPUs is to be had from $(NEWEST_INDEX)" >&2; exit 1; }; \
	$(@D)/bin/python -m pip install --no-deps $(NEWEST_OPTIONS) "torch==$$version"
	$(@D)/bin/python -m pip install --no-build-isolation $(WANTED)
	@touch $@
