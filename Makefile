# `make demo` and `make test` set up all that they need in .venv.

# Python 3.10 or newer.
PYTHON ?= python3
# What the demo runs on: tensorflow, jax or torch.
BACKEND ?= tensorflow
# Test processes at one time.
WORKERS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=

BACKENDS := tensorflow jax torch
# The lower bound in pyproject.toml, and a JAX that it knows.
OLDEST_KERAS := 3.8.0
OLDEST_JAX := 0.4.38

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Files that say what is installed; a second run finds them and installs nothing.
DEMO_READY := $(VENV)/.ready-demo-$(BACKEND)
TEST_READY := $(VENV)/.ready-test
OLDEST_READY := $(VENV)/keras-$(OLDEST_KERAS)/.ready

.DELETE_ON_ERROR:
.PHONY: help demo test test-full test-oldest lint format types benchmark clean
.PHONY: $(BACKENDS:%=test-%) $(BACKENDS:%=test-oldest-%)

help:
	@echo "make demo            a 3D U-Net on a real brain, whole and in pieces"
	@echo "make demo BACKEND=jax    the same on JAX (or torch)"
	@echo "make test            the tests on TensorFlow, JAX and PyTorch"
	@echo "make test-jax        the tests on JAX (or -tensorflow, -torch)"
	@echo "make test-full       the same with the slowest ones"
	@echo "make test-oldest     the tests with Keras $(OLDEST_KERAS)"
	@echo "make lint types      ruff and mypy;  make format  rewrites the files"
	@echo "make benchmark       the tables of benchmarks/results"
	@echo "make clean           removes .venv and what tools leave behind"

demo: $(DEMO_READY)
	$(BIN)/gradient-accumulator demo --backend $(BACKEND) $(DEMO_ARGS)

test: $(BACKENDS:%=test-%)

test-full:
	$(MAKE) test PYTEST_ARGS="-m 'full or not full'"

$(BACKENDS:%=test-%): test-%: $(TEST_READY)
	KERAS_BACKEND=$* $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-oldest: $(BACKENDS:%=test-oldest-%)

$(BACKENDS:%=test-oldest-%): test-oldest-%: $(OLDEST_READY)
	KERAS_BACKEND=$* PYTHONPATH=$(<D) \
	    $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
	$(BIN)/python -m benchmarks distributed
	$(BIN)/python -m benchmarks summary

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
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

# The oldest Keras lies in a folder of its own, over the same backends.
$(OLDEST_READY): $(TEST_READY)
	$(PIP) --upgrade --no-deps --target $(@D) keras==$(OLDEST_KERAS) \
	    jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX)
	@touch $@
