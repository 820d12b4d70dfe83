# make train: from a bare clone to a trained model.    make test: from a bare clone to a green suite.
# Both set up .venv first, once; after that only when the requirements change.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# One stamp per content of the requirements, and one per place, since a venv and an editable install remember their path.
HASH := $(shell { cat requirements.txt requirements-dev.txt pyproject.toml setup.py; pwd; } | cksum | tr ' ' '-')
VENV_READY := $(VENV)/ready-venv-$(shell pwd | cksum | tr ' ' '-')
TRAIN_READY := $(VENV)/ready-train-$(HASH)
DEV_READY := $(VENV)/ready-dev-$(HASH)

.PHONY: help setup train test test-full lint format docs bench gpu faults clean
.DEFAULT_GOAL := help

help:
	@echo "make train      set up and train the tiny model, on a GPU or on CPU; ARGS='key=value …' overrides"
	@echo "make test       set up, lint, check types, run the fast tests"
	@echo "make test-full  the same with the slow tests"
	@echo "make lint       ruff and mypy         make format  let ruff rewrite"
	@echo "make docs       regenerate docs/configuration.md"
	@echo "make bench      on a machine with a CUDA GPU: measure the attention beside dense attention; ARGS='--quick'"
	@echo "make setup      only set up $(VENV)     make clean   remove $(VENV) and caches"

# Tried by running, since a shim can exist for a Python that does not.
$(VENV_READY):
	@for candidate in "$(PYTHON)" python3 python3.11 python3.12; do \
	    [ -n "$$candidate" ] || continue; \
	    "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null || continue; \
	    echo "Setting up $(VENV) with $$("$$candidate" --version): a few minutes, once"; \
	    "$$candidate" -m venv --clear $(VENV) && touch $@ && exit 0; \
	    exit 2; \
	done; \
	echo "No Python 3.11 or 3.12 with its venv module was found (on Debian and Ubuntu: apt install python3-venv)." \
	    "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 2

$(TRAIN_READY): | $(VENV_READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@rm -f $(VENV)/ready-train-*
	@touch $@

$(DEV_READY): | $(VENV_READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	@rm -f $(VENV)/ready-train-* $(VENV)/ready-dev-*
	@touch $@ $(TRAIN_READY)

setup: $(TRAIN_READY)

train: $(TRAIN_READY)
	$(BIN)/python training/trainer.py model=tiny $(ARGS)
	@run="$(patsubst run_dir=%,%,$(lastword $(filter run_dir=%,$(ARGS))))"; \
	[ -n "$$run" ] || run="$$(ls -1dt runs/*/ | head -n 1)"; \
	echo "Next: $(BIN)/nsa generate $${run%/} --prompt 'def'"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-full: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_READY)
	$(BIN)/python docs/generate_configuration.py

# Before setting up anything: there is nothing to measure on another machine.
gpu:
	@nvidia-smi -L >/dev/null 2>&1 || ls /dev/nvidia0 >/dev/null 2>&1 || { echo "make bench: needs a CUDA GPU, and there is none here" >&2; exit 2; }

bench: gpu $(TRAIN_READY)
	$(BIN)/python benchmarks/attention.py $(ARGS)

# $(error) says its one line and ends make with status 2.
faults:
	$(error make faults: there is no table of faults yet)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
