# Every target sets itself up: a .venv pinned by constraints.txt, remade when its inputs change.
#
#   PYTHON=python3.12   the interpreter the .venv is made from; `make gpu PYTHON=python3` uses that one as it is
#   TORCH_INDEX=URL     the package index torch comes from, remembered by the .venv; TORCH_INDEX= goes back to the default
#   ARGS="-k matching"  further arguments for pytest, or for `make bench` of `dsd-fast bench`
#   SUITE=match         the suite that `make bench` runs
#
# `make test-oldest` runs what computes under the oldest versions that pyproject.toml admits, in a .venv-oldest. Of the GPU
# targets, `gpu` has checks and short benchmarks, `gpu-full` the long ones (interrupted, it goes on where it was), and
# `gpu-sanitize` runs the tests marked `sanitizer` under compute-sanitizer.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUITE ?= match
STAMP := $(VENV)/installed

# Oldest versions: what holds the arithmetic, and the tests of it. The rest of the house has the pinned versions alone.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/installed
OLDEST_TESTS := tests/kernels tests/unet tests/models

.PHONY: install install-oldest demo test test-oldest lint bench gpu gpu-full gpu-sanitize force

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/dsd-fast demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

install-oldest: $(OLDEST_STAMP)

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS) $(ARGS)

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
	$(GPU) -m benchmarks.gpu -- $(ARGS)

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
$(OLDEST_STAMP): WANTED := -e ".[triton]" pytest pytest-timeout hypothesis scikit-learn

# What is compiled is made anew when its source changes.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/cpu/*)
$(STAMP): constraints.txt $(SOURCES)
$(OLDEST_STAMP): constraints-oldest.txt $(SOURCES)
$(STAMP) $(OLDEST_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dsd_fast needs Python 3.11 or later; choose one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_OPTIONS) $(@D)
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) setuptools wheel
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) $(TORCH_OPTIONS) $(shell grep '^torch==' $(CONSTRAINTS))
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) --no-build-isolation $(WANTED)
	@echo "$(TORCH_INDEX)" > $@
