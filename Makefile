# Thin names over scripts.  `make run` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
PIP_ARGS ?=
KILLS ?= 30
KIND ?=
SEED ?= 0
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: run compare tracking study exploration test test-slow test-slurm test-sglang chaos lint bench layouts docs clean help

help:
	@echo "make run      set up .venv and run the main job (examples/entropy_control)"
	@echo "make compare  every schedule over 5 seeds, in one picture"
	@echo "make tracking  how closely entropy follows three curves on three tasks, over 5 seeds"
	@echo "make study    the paper's claims over 5 seeds, in one report (examples/entropy_study)"
	@echo "make exploration  ways to keep entropy over 10 seeds: does it pay? (examples/exploration)"
	@echo "make test     set up .venv and run the tests"
	@echo "make test-slow  the tests that take long: chaos, the study, full disks, every layout's models"
	@echo "make test-slurm  jobs on a real Slurm of four nodes on this host (root, Debian; installs 13 MB)"
	@echo "make test-sglang  the tests that talk to the real SGLang, on a CPU (installs 2.6 GB)"
	@echo "make chaos    disturb runs KILLS times (default 30); they must end as if nothing had happened"
	@echo "              KIND=rank|launcher|engine|stop|network|disk|clock: by one kind of fault alone"
	@echo "make bench    measure log-prob + entropy at V = 151,936, checkpoints, clipping, judging, steps, weights"
	@echo "make layouts  hold every layout to float64 and print the table of docs/layouts.md"
	@echo "make docs     write docs/config.md from the docstrings of the configuration"
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
	$(BIN)/megatron-gpc train examples/entropy_control/config.yaml

compare: .venv/.installed
	$(BIN)/python examples/entropy_control/compare.py

study: .venv/.installed
	$(BIN)/python examples/entropy_study/study.py

tracking: .venv/.installed
	$(BIN)/python examples/entropy_control/tracking.py

exploration: .venv/.installed
	$(BIN)/python examples/exploration/compare.py

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-slurm: .venv/.installed
	TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm

chaos: .venv/.installed
	PYTHONPATH=tests:. $(BIN)/python -m chaos --kills $(KILLS) --kind "$(KIND)" --seed $(SEED)

# The real SGLang on a CPU, in an environment of its own: some 2.6 GB.
.sglang/.installed: tests/sglang/requirements.txt
	$(PYTHON) -m venv .sglang
	.sglang/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $<
	.sglang/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps \
		sglang==0.5.23 sglang-router==0.3.2 torchvision==0.28.0
	touch $@

test-sglang: .venv/.installed .sglang/.installed
	SGLANG_PYTHON=$(CURDIR)/.sglang/bin/python $(BIN)/python -m pytest \
		tests/e2e/test_sglang.py tests/rollout/test_server_contract.py

bench: .venv/.installed
	$(BIN)/python tools/bench/head.py
	$(BIN)/python tools/bench/token_stats.py
	$(BIN)/python tools/bench/checkpoint.py
	$(BIN)/python tools/bench/update.py
	$(BIN)/python tools/bench/loop.py
	$(BIN)/python tools/bench/judge.py
	$(BIN)/python tools/bench/handover.py

layouts: .venv/.installed
	PYTHONPATH=tests:. $(BIN)/python tests/ranks/layouts.py

docs: .venv/.installed
	$(BIN)/python tools/config_docs.py > docs/config.md

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv .sglang build dist *.egg-info
