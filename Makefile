# `make train` and `make test` are all the set-up there is: they create .venv with what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/train/tiny.toml

.DEFAULT_GOAL := help
.PHONY: help train pod test test-fast lint format types docs notebook

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

train: $(VENV)/.package  ## train a small Qwen3-MoE on eight simulated devices (CONFIG=… for another run)
	$(BIN)/python -m train $(CONFIG)

pod: $(VENV)/.package  ## train by two processes, as two hosts of a pod: its first 30 steps
	$(BIN)/python -m train.pod 2 $(CONFIG) --fresh --run.output_dir runs/pod --run.max_steps 30

test: $(VENV)/.test  ## run the whole test suite
	$(BIN)/python -m pytest -n 2

test-fast: $(VENV)/.test  ## run the tests that need neither torch nor several processes, and are quick
	$(BIN)/python -m pytest -n 2 -m "not torch and not multiprocess and not slow"

lint: $(VENV)/.test  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test  ## check types
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

notebook: $(VENV)/.test  ## make examples/look_at_routing.ipynb anew from the script
	$(BIN)/python examples/make_notebook.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.package

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(VENV)/.package
