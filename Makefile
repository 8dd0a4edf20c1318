# Every task of the repository; `make` lists them. `make test` and `make demo` set up a fresh machine by themselves.

PYTHON ?= python3
PYTEST_ARGS ?=

BASE := smollm2-135m-instruct
BIN := .venv/bin
READY := .venv/.ready
SOURCES := src tests docs $(wildcard examples) $(wildcard bench)

SUPPORTED := import sys, venv; sys.exit(sys.version_info < (3, 11))
FREEZE := -m pip freeze --exclude postil
UNPINNED_LOCAL := s/+[A-Za-z0-9.]*$$//

export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup base test demo check format docs constraints clean

help: ## list these tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Another Python: make test PYTHON=python3.12    Some tests: make test PYTEST_ARGS='-k pack'    On more cores: make test WORKERS=8"

# Processes of one thread each: the models of the tests are too small to share.
WORKERS ?= 2

test: check base ## all checks, then every test
	@echo "postil: tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10 --durations-min=1 -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

demo: base ## train three notes, judge them, publish by policy, answer for all in one batch, roll back, write a report
	@$(BIN)/postil demo

check: $(READY) ## format, lint, types, import contract, docs
	@echo "postil: format";          $(BIN)/ruff format --quiet --check $(SOURCES) || { echo "Mend it with: make format" >&2; exit 1; }
	@echo "postil: lint";            $(BIN)/ruff check --quiet $(SOURCES)
	@echo "postil: types";           $(BIN)/mypy --no-error-summary
	@echo "postil: import contract"; out=$$($(BIN)/lint-imports --no-logo --no-cache 2>&1) || { echo "$$out" >&2; exit 1; }
	@echo "postil: docs";            $(BIN)/python docs/generate.py --check

format: $(READY) ## rewrite the code in the house format
	@$(BIN)/ruff check --quiet --fix $(SOURCES) || true
	@$(BIN)/ruff format $(SOURCES)

docs: $(READY) ## rewrite the generated parts of README.md and docs/
	@$(BIN)/python docs/generate.py

base: $(READY) ## fetch the small known base into the user's cache, once
	@$(BIN)/postil base get $(BASE)

setup: $(READY) ## only make .venv

# torch goes first and alone, by its pinned version: pip then takes a CPU build where one is on offer.
$(READY): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c '$(SUPPORTED)' >/dev/null 2>&1; then \
	    echo "postil: setting up .venv with $$("$$python" --version) (some minutes, once)"; \
	    exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo "postil needs Python 3.11 or newer with venv; found: $$($(PYTHON) --version 2>&1 || true)." >&2; \
	echo "Install one and run: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2; exit 1
	@$(BIN)/python -m pip install -qq -c constraints.txt torch
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test,dev]'
	@touch $@

constraints: $(READY) ## renew constraints.txt with the newest releases that pyproject.toml allows
	@rm -rf build/constraints
	@$(BIN)/python -m venv build/constraints
	@echo "postil: installing the newest releases (some minutes)"
	@build/constraints/bin/python -m pip install -qq '.[test,dev]'
	@{ echo "# The exact versions that make installs and the tests passed with; renew them with: make constraints"; \
	   build/constraints/bin/python $(FREEZE) | sed '$(UNPINNED_LOCAL)' | LC_ALL=C sort -f; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@rm -rf build/constraints
	@echo "constraints.txt is new: run make test, then commit it"

clean: ## remove .venv, caches and builds (runs/, reports and the fetched base stay)
	@rm -rf .venv .mypy_cache .ruff_cache .hypothesis .import_linter_cache .pytest_cache build dist
	@find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
