# `make demo` and `make test` set up all that they need in .venv.

# Python 3.10 or newer.
PYTHON ?= python3
# The backend of the demonstration: tensorflow, jax or torch.
BACKEND ?= tensorflow
# The number of test processes that run at one time.
WORKERS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=

BACKENDS := tensorflow jax torch
# The oldest Keras that pyproject.toml allows, and a JAX that it works with.
OLDEST_KERAS := 3.8.0
OLDEST_JAX := 0.4.38

# TensorFlow 2.12 and 2.15 need Python 3.10 or 3.11.
KERAS2_PYTHON ?= $(or $(shell command -v python3.11 || command -v python3.10),$(PYTHON))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Runs the tests on the backends that follow it, one after another.
EACH_BACKEND = $(BIN)/python tests/each_backend.py $(if $(COVERAGE),--coverage)
IN_PROCESSES := -n $(WORKERS) --dist loadgroup

# These files exist after an installation, so that a second run installs nothing.
DEMO_READY := $(VENV)/.ready-demo-$(BACKEND)
TEST_READY := $(VENV)/.ready-test
OLDEST_READY := $(VENV)/keras-$(OLDEST_KERAS)/.ready
TF_KERAS_READY := $(VENV)/tf_keras/.ready
KERAS2_READY := $(VENV)-keras2/.ready
KERAS2_OLDEST_READY := $(VENV)-keras2-oldest/.ready

.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-full test-oldest compare-core choose-core
.PHONY: lint format types benchmark clean
.PHONY: test-keras2 test-keras2-2.15 test-keras2-tf_keras test-keras2-oldest
.PHONY: benchmark-keras2
.PHONY: $(BACKENDS:%=test-%) $(BACKENDS:%=test-all-%) $(BACKENDS:%=test-oldest-%)

help:
	@echo "make demo            a real brain and sentences: the batch, and micro-batches"
	@echo "make demo BACKEND=jax    the demonstration on JAX (or torch)"
	@echo "make test            the core of the tests on TensorFlow, JAX and PyTorch"
	@echo "make test-jax        the core on JAX (or -tensorflow, -torch)"
	@echo "make test-all        all tests that a change must pass; test-all-jax on JAX"
	@echo "make test-full       all tests, and the slowest tests too"
	@echo "make test-oldest     the tests with Keras $(OLDEST_KERAS)"
	@echo "make test-keras2     the tests on Keras 2: TensorFlow 2.15, and tf_keras"
	@echo "make test-keras2-oldest  the tests on Keras 2: TensorFlow 2.12"
	@echo "make lint types      ruff, import-linter, sizes and words, mypy;  make format  rewrites"
	@echo "make benchmark       the tables of benchmarks/results"
	@echo "make benchmark-keras2    compares with gradient-accumulator 0.5.2"
	@echo "make clean           removes .venv and the files that tools leave"

demo: $(DEMO_READY)
	$(BIN)/gradient-accumulator demo --backend $(BACKEND) $(DEMO_ARGS)

CORE := HYPOTHESIS_PROFILE=core

test: $(TEST_READY)
	$(CORE) $(EACH_BACKEND) $(BACKENDS) -- $(IN_PROCESSES) -m "core and not slow and not full" $(PYTEST_ARGS)

$(BACKENDS:%=test-%): test-%: $(TEST_READY)
	$(CORE) $(EACH_BACKEND) $* -- $(IN_PROCESSES) -m "core and not slow and not full" $(PYTEST_ARGS)

test-all: $(TEST_READY)
	$(EACH_BACKEND) $(BACKENDS) -- $(IN_PROCESSES) $(PYTEST_ARGS)

$(BACKENDS:%=test-all-%): test-all-%: $(TEST_READY)
	$(EACH_BACKEND) $* -- $(IN_PROCESSES) $(PYTEST_ARGS)

test-full:
	OPTIMIZED=1 $(MAKE) test-all PYTEST_ARGS="-m 'full or not full' $(PYTEST_ARGS)"

test-oldest: $(OLDEST_READY)
	PYTHONPATH=$(<D) $(EACH_BACKEND) $(BACKENDS) -- $(IN_PROCESSES) $(PYTEST_ARGS)

$(BACKENDS:%=test-oldest-%): test-oldest-%: $(OLDEST_READY)
	PYTHONPATH=$(<D) $(EACH_BACKEND) $* -- $(IN_PROCESSES) $(PYTEST_ARGS)

# Run it after `make test-all COVERAGE=yes`. It fails if the core runs too few branches.
compare-core: $(TEST_READY)
	$(BIN)/python tests/core.py compare

# Chooses the tests of a new core. `python tests/core.py choose --help` says more.
choose-core: $(TEST_READY)
	$(BIN)/python tests/core.py choose

# The tests that run on Keras 2.
KERAS2_TESTS := tests/keras2 tests/test_fit_exact.py tests/test_optimizer_exact.py

test-keras2: test-keras2-2.15 test-keras2-tf_keras

test-keras2-2.15: $(KERAS2_READY)
	PYTHONPATH=. $(<D)/bin/python -m pytest $(IN_PROCESSES) \
	    $(KERAS2_TESTS) $(PYTEST_ARGS)

test-keras2-tf_keras: $(TF_KERAS_READY)
	TF_USE_LEGACY_KERAS=1 PYTHONPATH=.:$(<D) \
	    $(BIN)/python -m pytest $(IN_PROCESSES) \
	    $(KERAS2_TESTS) $(PYTEST_ARGS)

test-keras2-oldest: $(KERAS2_OLDEST_READY)
	PYTHONPATH=. $(<D)/bin/python -m pytest $(IN_PROCESSES) \
	    $(KERAS2_TESTS) $(PYTEST_ARGS)

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/measures.py

format: $(TEST_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(TEST_READY)
	$(BIN)/mypy

benchmark: $(TEST_READY)
	$(BIN)/python -m benchmarks speed
	$(BIN)/python -m benchmarks memory
	$(BIN)/python -m benchmarks exactness
	$(BIN)/python -m benchmarks loops
	$(BIN)/python -m benchmarks normalization
	$(BIN)/python -m benchmarks digits
	$(BIN)/python -m benchmarks distributed
	$(BIN)/python -m benchmarks summary

benchmark-keras2: $(KERAS2_READY)
	$(<D)/bin/python -m pip install --quiet --no-deps \
	    --target $(<D)/released gradient-accumulator==0.5.2
	GRADIENT_ACCUMULATOR_0_5_2=$(<D)/released $(<D)/bin/python -m benchmarks keras2

clean:
	rm -rf $(VENV) $(VENV)-keras2 $(VENV)-keras2-oldest .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .grimp_cache .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: Python 3.10 or newer is needed. Received: PYTHON=$(PYTHON)," \
	        "which is $$($(PYTHON) --version 2>&1)." \
	        "Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO_READY): pyproject.toml requirements/$(BACKEND).txt | $(BIN)/python
	@echo "Installing into $(VENV): a minute or two, the first time only."
	$(PIP) -r requirements/$(BACKEND).txt -e '.[demo]'
	@touch $@

$(TEST_READY): pyproject.toml $(wildcard requirements/*.txt) | $(BIN)/python
	@echo "Installing into $(VENV): two or three minutes, the first time only."
	$(PIP) -r requirements/test.txt
	@touch $@

$(KERAS2_READY) $(KERAS2_OLDEST_READY): $(VENV)-%/.ready: requirements/%.txt
	@$(KERAS2_PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' \
	    || { echo "error: TensorFlow with Keras 2 needs Python 3.10 or 3.11." \
	        "Received: KERAS2_PYTHON=$(KERAS2_PYTHON)" >&2; exit 1; }
	$(KERAS2_PYTHON) -m venv $(@D)
	@echo "Installing into $(@D): a minute, the first time only."
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Keras 2 with the newest TensorFlow, which is installed already: `--no-deps`.
$(TF_KERAS_READY): $(TEST_READY)
	version=$$($(BIN)/python -c 'from tensorflow import version; print(version.VERSION)') && \
	$(PIP) --upgrade --no-deps --target $(@D) "tf_keras~=$$version"
	@touch $@

# The oldest Keras is in its own folder. It uses the installed backends, except for JAX.
$(OLDEST_READY): $(TEST_READY)
	$(PIP) --upgrade --no-deps --target $(@D) keras==$(OLDEST_KERAS) \
	    jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX)
	@touch $@
