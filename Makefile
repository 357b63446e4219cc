# sollold: `make run` serves, `make test` tests, `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
           --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help setup run demo test ci check bench sim chaos splits deb dist lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: requirements.lock pyproject.toml
	@packaging/prerequisites $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.tests: tests/requirements.lock $(VENV)/.installed
	$(PIP) --require-hashes -r tests/requirements.lock
	@touch $@

setup: $(VENV)/.installed ## virtual environment, dependencies, llama.cpp
	@$(BIN)/sollold setup

run: setup ## serve on this machine
	@$(BIN)/sollold run --demo-model

demo: setup ## three daemons as a cluster, one model spread over them
	@$(BIN)/sollold demo

test: setup $(VENV)/.tests ## all tests
	@packaging/prerequisites --tests $(PYTHON)
	$(BIN)/python -m pytest

check: $(VENV)/.tests ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ci: check test ## what continuous integration runs

bench: setup $(VENV)/.tests ## all benchmarks, as tables
	@$(BIN)/python -m tests.bench

sim: $(VENV)/.tests ## the simulator; SEED=n replays one schedule
	@$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED))

chaos: setup $(VENV)/.tests ## faults on a real cluster; FAULTS=200 SEED=1
	@$(BIN)/python -m tests.chaos --faults $(or $(FAULTS),200) --seed $(or $(SEED),1)

splits: setup $(VENV)/.tests ## a real cluster is split in two again and again; ROUNDS=20 SEED=7
	@SOLLOLD_TEST_SPLITS=$(or $(ROUNDS),20) SOLLOLD_TEST_SEED=$(or $(SEED),7) \
	  $(BIN)/python -m pytest -q -s tests/cluster/test_splits.py -k splits_end

deb: $(VENV)/.tests ## Debian packages into dist/
	$(BIN)/python packaging/deb/build

dist: $(VENV)/.tests ## wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation --outdir dist

lock: ## renew the lock files
	$(BIN)/uv $(COMPILE) --output-file requirements.lock pyproject.toml
	$(BIN)/uv $(COMPILE) --group dev --group package --constraint requirements.lock \
	  --output-file tests/requirements.lock pyproject.toml

clean: ## remove what was built here (not the cache)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
