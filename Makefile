# sollold: `make run` serves, `make test` tests, `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RELEASE := build/release
COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
           --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help setup run demo test ci check bench sim chaos hostile soak splits screenshots docs deb repo dist \
        audit release lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	$(BIN)/python -m tests

check: $(VENV)/.tests ## style, types, imports, dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/vulture

ci: check test ## what continuous integration runs

bench: setup $(VENV)/.tests ## all benchmarks, as tables
	@$(BIN)/python -m tests.bench

sim: $(VENV)/.tests ## the simulator; SEED=n replays one schedule
	@$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED))

chaos: setup $(VENV)/.tests ## faults on a real cluster; FAULTS=200 SEED=1
	@$(BIN)/python -m tests.chaos --faults $(or $(FAULTS),200) --seed $(or $(SEED),1)

hostile: setup $(VENV)/.tests ## hostile requests and connections to real daemons; REQUESTS=20000 CONNECTIONS=1000 SEED=1
	@$(BIN)/python -m tests.hostile --requests $(or $(REQUESTS),20000) --connections $(or $(CONNECTIONS),1000) \
	  --seed $(or $(SEED),1)

soak: setup $(VENV)/.tests ## a cluster at work for hours, which must not grow; HOURS=2 SEED=1
	@$(BIN)/python -m tests.soak --hours $(or $(HOURS),2) --seed $(or $(SEED),1)

splits: setup $(VENV)/.tests ## a real cluster is split in two again and again; ROUNDS=20 SEED=7
	@SOLLOLD_TEST_SPLITS=$(or $(ROUNDS),20) SOLLOLD_TEST_SEED=$(or $(SEED),7) \
	  $(BIN)/python -m pytest -q -s tests/cluster/test_splits.py -k splits_end

screenshots: $(VENV)/.tests ## pictures of the dashboard into build/screenshots/
	@$(BIN)/python -m tests.web.screenshots

docs: $(VENV)/.tests ## the documentation as a site in build/site/
	@$(BIN)/python -m tests.docs.pages
	@$(BIN)/python -m mkdocs build --strict --quiet

deb: $(VENV)/.tests ## Debian packages into dist/
	$(BIN)/python packaging/deb/build

repo: deb ## an apt repository from the packages, in dist/apt; KEY=… signs it
	$(BIN)/python packaging/apt/build $(if $(KEY),--sign $(KEY))

dist: $(VENV)/.tests ## wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation --outdir dist

$(RELEASE)/.installed: packaging/release.lock
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --require-hashes -r packaging/release.lock
	@touch $@

audit: $(RELEASE)/.installed ## known vulnerabilities of what is locked; a list of the parts into dist/
	@mkdir -p dist
	$(RELEASE)/bin/cyclonedx-py requirements --output-reproducible -o dist/sollold.cdx.json requirements.lock
	for lock in requirements.lock sollold/engines/install/build_tools.lock; do \
	  $(RELEASE)/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r $$lock || exit 1; \
	done

release: check audit repo dist ## all that is published, into dist/

lock: ## renew the lock files
	$(BIN)/uv $(COMPILE) --output-file requirements.lock pyproject.toml
	$(BIN)/uv $(COMPILE) --group dev --group package --constraint requirements.lock \
	  --output-file tests/requirements.lock pyproject.toml
	$(BIN)/uv $(COMPILE) --group llama --output-file sollold/engines/install/build_tools.lock
	$(BIN)/uv $(COMPILE) --group release --output-file packaging/release.lock

clean: ## remove what was built here (not the cache)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
