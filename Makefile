PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help demo demo-seeds test lint format examples clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

.venv/ready: pyproject.toml constraints.txt scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh .venv

demo: .venv/ready ## RLHF on a laptop: reward model, then policy and value model together
	$(BIN)/tandem demo

demo-seeds: .venv/ready ## the demo on three seeds, side by side in docs/results/demo.md
	for seed in 0 1 2; do $(BIN)/tandem demo --seed $$seed --run-dir runs/demo-seed-$$seed || exit 1; done
	$(BIN)/python benchmarks/demo_seeds.py runs/demo-seed-0 runs/demo-seed-1 runs/demo-seed-2

test: .venv/ready ## the test suite
	$(BIN)/python -m pytest

lint: .venv/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

examples: .venv/ready ## run every example
	@for file in examples/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove the environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
