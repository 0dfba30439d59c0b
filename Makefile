# make help lists the targets. Everything lives in .venv, .tox and dist/; nothing is installed elsewhere.

VENV ?= .venv
PLUGINS := $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
STAMP := $(VENV)/.installed
SRC ?=
PYTEST_ARGS ?=
WORKERS ?= 3
BENCH_ARGS ?=
BUDGET_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(sort $(notdir $(wildcard tests/fuzz/corpus/*)))

# What an editable installation of everything must advertise (tests/plugins checks it).
export AMST_EXPECT_PLUGINS ?= amst.transport:tcp,amst.congestion:bbr,amst.congestion:cubic

.DEFAULT_GOAL := help
.PHONY: help install test lint demo bench budget wheels matrix fuzz clean

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

# Tests wait more than they compute, so WORKERS files of them run side by side; then those marked `alone`. That a choice of
# PYTEST_ARGS leaves one part empty (exit code 5) is no failure.
test: install ## run all tests in .venv (PYTEST_ARGS='-k plugins' passes through)
	@code=0; \
	run() { \
	    echo "pytest $$*"; \
	    $(VENV)/bin/python scripts/run_tests.py "$$@" $(PYTEST_ARGS) || $(if $(PYTEST_ARGS),[ $$? = 5 ],false) || code=1; \
	}; \
	run -n $(WORKERS) --dist loadfile -m 'not alone' tests $(wildcard plugins/*/tests); \
	run -m alone tests; \
	exit $$code

lint: install ## ruff and mypy --strict
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy --strict amst_core $(PLUGINS:%=%/src)

demo: install ## copy a real tree and a large file through a server, and compare (SRC=DIR chooses the tree)
	$(VENV)/bin/python scripts/demo.py $(if $(SRC),--source "$(SRC)")

bench: install ## the speed table beside other tools, see docs/performance.md (BENCH_ARGS='--only memory --rounds 3')
	$(VENV)/bin/python benchmarks/compare.py $(BENCH_ARGS)

budget: install ## count system calls and allocations against the recorded budget (BUDGET_ARGS=--record renews it)
	$(VENV)/bin/python benchmarks/budget.py $(BUDGET_ARGS)

wheels: install ## build the wheels of the core and all plugins into dist/
	rm -rf build/lib build/bdist.* $(PLUGINS:%=%/build)
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist . $(PLUGINS:%=./%)
	@ls -1 dist/*.whl

matrix: install ## run the tests from built wheels on every Python 3.11 to 3.13 found, with and without plugins
	$(VENV)/bin/python scripts/matrix.py

# New inputs and what fails go to build/fuzz/TARGET; an input that failed belongs into tests/fuzz/corpus/TARGET.
fuzz: install ## run each fuzz target under atheris for FUZZ_SECONDS (FUZZ_TARGETS='engine records' chooses)
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || $(VENV)/bin/python -m pip install --quiet atheris || \
	    { echo "make fuzz needs atheris, which cannot be installed here" >&2; exit 1; }
	@failed=; for target in $(FUZZ_TARGETS); do \
	    echo "== fuzzing $$target for $(FUZZ_SECONDS) s"; \
	    mkdir -p build/fuzz/$$target; \
	    $(VENV)/bin/python tests/fuzz/fuzz.py $$target -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -verbosity=0 \
	        -print_final_stats=1 -artifact_prefix=build/fuzz/$$target/ build/fuzz/$$target || failed="$$failed $$target"; \
	done; if [ -n "$$failed" ]; then echo "== FAILED:$$failed"; exit 1; fi

clean: ## remove .venv, build results and caches
	rm -rf $(VENV) .tox build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(PLUGINS:%=%/build)
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
