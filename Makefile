# make help lists the targets. Everything lives in .venv, .tox and dist/; nothing is installed elsewhere.

VENV ?= .venv
PLUGINS := $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
STAMP := $(VENV)/.installed
SRC ?=
PYTEST_ARGS ?=

# What an editable installation of everything must advertise (tests/plugins checks it).
export AMST_EXPECT_PLUGINS ?= amst.transport:tcp

.DEFAULT_GOAL := help
.PHONY: help install test lint demo wheels matrix clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with pip, tox, the core and all plugins (editable)

$(STAMP): Makefile pyproject.toml $(PLUGINS:%=%/pyproject.toml) scripts/find_python.sh
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	    python=$$(sh scripts/find_python.sh) && "$$python" -m venv $(VENV); \
	fi
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[test,dev]' $(PLUGINS:%=--editable ./%)
	@touch $@

test: install ## run all tests in .venv (PYTEST_ARGS='-k plugins' passes through)
	$(VENV)/bin/python -m pytest tests $(wildcard plugins/*/tests) $(PYTEST_ARGS)

lint: install ## ruff and mypy --strict
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy --strict amst_core $(PLUGINS:%=%/src)

demo: install ## copy a real tree and a large file through a server, and compare (SRC=DIR chooses the tree)
	$(VENV)/bin/python scripts/demo.py $(if $(SRC),--source "$(SRC)")

wheels: install ## build the wheels of the core and all plugins into dist/
	rm -rf build $(PLUGINS:%=%/build)
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist . $(PLUGINS:%=./%)
	@ls -1 dist/*.whl

matrix: install ## run the tests from built wheels on every Python 3.11 to 3.13 found, with and without plugins
	$(VENV)/bin/python scripts/matrix.py

clean: ## remove .venv, build results and caches
	rm -rf $(VENV) .tox build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(PLUGINS:%=%/build)
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
