# The targets of a checkout. `make help` lists them.
#
# MODEL    model folder of `make serve`
# ARGS     further flags of `vashista serve`, such as ARGS="--port 8080"
# PYTHON   interpreter for the environment (3.11 to 3.13)
# TORCH    cpu, cuda or auto: which build of torch to install
# TESTS    what `make test` gives to pytest
# JOBS     how many processes run the tests; as many as cores, at most 4, unless given

MODEL ?= deploy/models/reference-26m
ARGS ?=
PYTHON ?= python3
TORCH ?= auto
TESTS ?= tests
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -gt 4 ] && n=4; echo $$n)
VENV := .venv
BIN := $(VENV)/bin
# Without PYTHONSAFEPATH the checkout's own kernels/ would be importable as `kernels`.
PYTEST := PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(BIN)/pytest

export PYTHON TORCH
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help serve test lint checked pytest types docs lock wheel clean venv dev-venv

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

serve: venv ## install what the lock pins, start the server with the bundled model, print its address and a curl
	@exec $(BIN)/vashista serve --model $(MODEL) $(ARGS)

test: dev-venv types ## all checks: format, lint, types, import rules, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@{ $(MAKE) --no-print-directory checked >build/checked.log 2>&1; s=$$?; cat build/checked.log; exit $$s; } & \
	checked=$$!; $(MAKE) --no-print-directory pytest; tests=$$?; \
	wait $$checked || { tests=1; cat build/checked.log; }; exit $$tests

lint: dev-venv types ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory checked

checked: # what of lint takes long; `test` runs it beside the tests and prints it when it ends, and again at the end if it failed
	MYPYPATH=build/types $(BIN)/mypy
	$(BIN)/lint-imports

pytest: dev-venv ## the tests; TESTS chooses some
	$(PYTEST) -x -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

types: ## links that show mypy the folders under their package names
	@mkdir -p build/types/vashista
	@for name in server engine kernels; do ln -sfn ../../../$$name build/types/vashista/$$name; done

docs: dev-venv ## write README's tables anew from settings, errors and metrics
	$(BIN)/python -m vashista.server.reference README.md

lock: dev-venv ## write deploy/lock/*.txt anew from pyproject.toml; needs a package index
	UV=$(CURDIR)/$(BIN)/uv PYTHON=$(CURDIR)/$(BIN)/python sh deploy/lock.sh

wheel: dev-venv ## build the wheel and the source archive into dist/
	rm -rf build/lib dist
	$(BIN)/python -m build --no-isolation

clean: ## remove what the targets make, the environment too
	rm -rf $(VENV) build dist vashista.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@sh deploy/venv.sh $(VENV)

dev-venv:
	@sh deploy/venv.sh $(VENV) dev
