# Every target sets itself up: a .venv pinned by constraints.txt, remade when its inputs change.
#
#   PYTHON=python3.12   the interpreter the .venv is made from; `make gpu PYTHON=python3` uses that one as it is
#   TORCH_INDEX=URL     the package index torch comes from, remembered by the .venv; TORCH_INDEX= goes back to the default
#   ARGS="-k matching"  further arguments for pytest, or for `make bench` of `dsd-fast bench`
#   SUITE=match         the suite that `make bench` runs

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
SUITE ?= match
STAMP := $(VENV)/installed
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: install demo test lint bench gpu force

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/dsd-fast demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/dsd-fast bench $(SUITE) $(ARGS)
	$(BIN)/dsd-fast bench-docs

# A given interpreter has its own torch and perhaps no network: nothing is installed into it.
ifeq ($(origin PYTHON),command line)
gpu:
	$(PYTHON) -m pytest -m gpu $(ARGS)
else
gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(ARGS)
endif

# An installed torch meets the pin whatever index it came from, so another index means a new environment.
INSTALLED_INDEX := $(shell cat $(STAMP) 2>/dev/null)
TORCH_INDEX ?= $(INSTALLED_INDEX)
ifneq ($(TORCH_INDEX),$(INSTALLED_INDEX))
VENV_OPTIONS := --clear
$(STAMP): force
endif
ifneq ($(TORCH_INDEX),)
# torch alone: the rest, its NVIDIA packages included, comes from the ordinary index in the last step.
TORCH_OPTIONS := --no-deps --index-url $(TORCH_INDEX)
endif

$(STAMP): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dsd_fast needs Python 3.11 or later; choose one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt $(TORCH_OPTIONS) $(TORCH)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@echo "$(TORCH_INDEX)" > $@
