# Thin names over scripts.  `make run` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: run compare test lint bench layouts clean help

help:
	@echo "make run      set up .venv and run the main job (examples/arithmetic)"
	@echo "make compare  static clipping against ID over 3 seeds, in one picture"
	@echo "make test     set up .venv and run the tests"
	@echo "make bench    measure log-prob + entropy at V = 151,936"
	@echo "make layouts  hold every layout to float64 and print the table of docs/layouts.md"
	@echo "make lint     ruff and pyright"

.venv/.installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[test]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[dev]'
	touch $@

run: .venv/.installed
	$(BIN)/megatron-gpc train examples/arithmetic/config.yaml

compare: .venv/.installed
	$(BIN)/python examples/arithmetic/compare.py

test: .venv/.installed
	$(BIN)/python -m pytest

bench: .venv/.installed
	$(BIN)/python tools/bench/token_stats.py

layouts: .venv/.installed
	$(BIN)/python tests/dist/layouts.py

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info
