PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed is: the environment newer than what says what belongs into it.
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test lint types format bench clean clean-cache

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(INSTALLED)  ## create .venv and install the program with all that tests and default configs use

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: setup  ## run the main job on the embedded data: a private synthetic data set in minutes
	$(BIN)/python -m dp_synth.train

test: setup lint types  ## lint, type check, run all tests
	$(BIN)/python -m pytest -q -n auto

lint: setup  ## check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup  ## check types
	$(BIN)/mypy

format: setup  ## put code into the one style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: setup  ## time and memory of the clipping engine against its rivals: takes long
	$(BIN)/python benchmarks/clipping.py --memory

clean:  ## remove the environment and what tools left; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info

clean-cache:  ## remove cached public models, decoded private images, downloads
	rm -rf "$${DP_SYNTH_CACHE:-$$HOME/.cache/dp_synth}"
