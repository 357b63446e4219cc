# sollold: `make run` starts a daemon, `make test` runs the tests, `make help` lists all targets.

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

help: ## show this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: requirements.lock pyproject.toml
	@packaging/prerequisites $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock || { echo "The dependencies could not be installed: see above. \
	Fetching them needs a Python package index; PIP_INDEX_URL names another one than pypi.org." >&2; exit 1; }
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.tests: tests/requirements.lock $(VENV)/.installed
	$(PIP) --require-hashes -r tests/requirements.lock
	@touch $@

setup: $(VENV)/.installed ## set up the virtual environment, dependencies and llama.cpp
	@$(BIN)/sollold setup

run: setup ## run a daemon on this machine
	@$(BIN)/sollold run --demo-model

demo: setup ## run three daemons as a cluster, with one model spread over them
	@$(BIN)/sollold demo

test: setup $(VENV)/.tests ## run all tests
	@packaging/prerequisites --tests $(PYTHON)
	$(BIN)/python -m tests

check: $(VENV)/.tests ## check style, types, imports and dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/vulture

ci: check test ## run what continuous integration runs

bench: setup $(VENV)/.tests ## run all benchmarks
	@$(BIN)/python -m tests.bench

sim: $(VENV)/.tests ## run the simulator; SEED=n replays one schedule
	@$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED))

chaos: setup $(VENV)/.tests ## inject faults into a real cluster; FAULTS=200 SEED=1
	@$(BIN)/python -m tests.chaos --faults $(or $(FAULTS),200) --seed $(or $(SEED),1)

hostile: setup $(VENV)/.tests ## send malicious requests and connections to real daemons; REQUESTS=20000 CONNECTIONS=1000 SEED=1
	@$(BIN)/python -m tests.hostile --requests $(or $(REQUESTS),20000) --connections $(or $(CONNECTIONS),1000) \
	  --seed $(or $(SEED),1)

soak: setup $(VENV)/.tests ## load a cluster for hours and check that nothing grows; HOURS=2 SEED=1
	@$(BIN)/python -m tests.soak --hours $(or $(HOURS),2) --seed $(or $(SEED),1)

splits: setup $(VENV)/.tests ## partition a real cluster repeatedly; ROUNDS=20 SEED=7
	@SOLLOLD_TEST_SPLITS=$(or $(ROUNDS),20) SOLLOLD_TEST_SEED=$(or $(SEED),7) \
	  $(BIN)/python -m pytest -q -s tests/cluster/test_splits.py -k splits_end

screenshots: $(VENV)/.tests ## write screenshots of the dashboard to build/screenshots/
	@$(BIN)/python -m tests.web.screenshots

docs: $(VENV)/.tests ## build the documentation site in build/site/
	@$(BIN)/python -m tests.docs.pages
	@$(BIN)/python -m mkdocs build --strict --quiet

deb: $(VENV)/.tests ## build the Debian packages in dist/
	$(BIN)/python packaging/deb/build

repo: deb ## build an apt repository in dist/apt; KEY=… signs it
	$(BIN)/python packaging/apt/build $(if $(KEY),--sign $(KEY))

dist: $(VENV)/.tests ## build the wheel and sdist in dist/
	$(BIN)/python -m build --no-isolation --outdir dist

$(RELEASE)/.installed: packaging/release.lock
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --require-hashes -r packaging/release.lock
	@touch $@

audit: $(RELEASE)/.installed ## check dependencies for known vulnerabilities; write an SBOM to dist/
	@mkdir -p dist
	$(RELEASE)/bin/cyclonedx-py requirements --output-reproducible -o dist/sollold.cdx.json requirements.lock
	for lock in requirements.lock sollold/engines/install/build_tools.lock; do \
	  $(RELEASE)/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r $$lock || exit 1; \
	done

release: check audit repo dist ## build everything to publish, in dist/

lock: ## update the lock files
	$(BIN)/uv $(COMPILE) --output-file requirements.lock pyproject.toml
	$(BIN)/uv $(COMPILE) --group dev --group package --constraint requirements.lock \
	  --output-file tests/requirements.lock pyproject.toml
	$(BIN)/uv $(COMPILE) --group llama --output-file sollold/engines/install/build_tools.lock
	$(BIN)/uv $(COMPILE) --group release --output-file packaging/release.lock

clean: ## remove everything built here (not the cache)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
