# Needs Python 3.11 or newer, make, and g++ for the compiled part. Everything else goes into a
# virtual environment, .venv, on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
GPU_PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
CPP := $(wildcard csrc/*.* csrc/*/*.*)
GPU_TESTS = $(shell grep -rl 'mark\.gpu' tests)
SANITIZED := build/sanitized

.DEFAULT_GOAL := help
.PHONY: help install demo test sanitize lint format bench gpu clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(VENV)/.installed  ## make .venv and install the package with what it needs to run

demo: $(VENV)/.installed  ## prune, heal and evaluate the bundled model
	$(BIN)/interlace demo

test: $(VENV)/.installed-dev  ## run all CPU tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --benchmark-disable $(PYTEST_ARGS)

sanitize: $(VENV)/.installed-dev  ## run the tests of the C++ kernels under ASan and UBSan
	rm -rf $(SANITIZED)
	CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LDFLAGS=-fsanitize=address,undefined INTERLACE_EXTENSION=require INTERLACE_BUILD_CUDA=0 \
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target $(SANITIZED) .
	LD_PRELOAD="$(shell c++ -print-file-name=libasan.so) $(shell c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 PYTHONPATH=$(CURDIR)/$(SANITIZED) \
	$(BIN)/pytest --benchmark-disable tests/ops --ignore tests/ops/test_aot.py \
	--ignore tests/ops/test_nvcc.py --ignore tests/ops/test_interpreter.py --timeout 900

lint: $(VENV)/.installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed-dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.installed-dev  ## time the ops, whole models and scoring on the CPU
	$(BIN)/interlace bench --device cpu --all
	$(BIN)/python bench/e2e.py --preset small
	$(BIN)/python bench/score_speed.py

# Some ten minutes, with torch, triton, transformers, pytest and nvcc there and no package index in
# reach. Installs into GPU_PYTHON itself. Every step runs, whatever became of the one before. -P: the
# repository's root must not be on sys.path, where it would hide the installed package.
gpu:  ## on a GPU machine: install, run the GPU tests, time ops and models (RESULTS=folder)
	@failed=; \
	step() { echo; echo "== $$*"; "$$@" || failed="$$failed\n  $$*"; }; \
	step env INTERLACE_EXTENSION=require INTERLACE_BUILD_CUDA=1 \
		$(GPU_PYTHON) -P -m pip install --disable-pip-version-check --no-deps --no-build-isolation .; \
	step env OMP_NUM_THREADS=1 timeout 280 $(GPU_PYTHON) -P -m pytest -m gpu -n 8 --benchmark-disable \
		--continue-on-collection-errors $(PYTEST_ARGS) $(GPU_TESTS); \
	step timeout 180 $(GPU_PYTHON) -P -m interlace bench --device cuda --all --budget 140 \
		$(if $(RESULTS),--output $(RESULTS)) $(BENCH_ARGS); \
	step timeout 300 $(GPU_PYTHON) bench/e2e.py --preset full --budget 220 \
		$(if $(RESULTS),--output $(RESULTS)); \
	if test -n "$$failed"; then printf "\nfailed:%b\n" "$$failed"; exit 1; fi

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info interlace/_C*.so .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "$(PYTHON) is too old; set PYTHON to Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(BIN)/python $(BUILD_INPUTS)
	$(INSTALL) -e '.[eval]'
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python $(BUILD_INPUTS)
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
