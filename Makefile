# The environment is .venv, made from python3 at first use and renewed when setup.cfg or constraints.txt change.
#   make quickstart FAST=1        two minutes instead of twelve
#   make test ARGS="-k routing"   any further arguments of the command behind a target

PYTHON3 ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.molora-installed
ARGS ?=

# A spinning OpenMP thread makes a step 15 times slower beside one other busy process.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test slow readme lint types format bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

venv: $(STAMP) ## make or renew .venv with exactly the versions of constraints.txt

quickstart: $(STAMP) ## train a mixture on a real model and real data, and report (FAST=1: in two minutes)
	$(BIN)/python examples/quickstart.py $(if $(FAST),--fast) $(ARGS)

test slow readme: export HF_HUB_OFFLINE := 1
test slow readme: export HF_DATASETS_OFFLINE := 1

test: $(STAMP) ## the default test suite
	$(BIN)/python -m pytest $(ARGS)

slow: $(STAMP) ## the tests that take minutes
	@# 5: no slow test there, which is not a failure
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800 $(ARGS) || [ $$? -eq 5 ]

readme: $(STAMP) ## run the commands and code blocks of README.md and CONTRIBUTING.md
	$(BIN)/python -m pytest tests/test_readme.py $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

format: $(STAMP) ## rewrite files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the cost of a training step against the frozen base
	$(BIN)/python benchmarks/step_cost.py $(ARGS)

clean: ## remove caches and build leftovers; .venv and runs/ stay
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find molora tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "molora needs Python 3.11 or newer; $(PYTHON3) is older. Run: make PYTHON3=python3.11 ..." >&2; exit 1; }
	@$(PYTHON3) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 cannot make an environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(STAMP): setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,viz,dev]'
	@touch $@
