PYTHON ?= python3
BIN := .venv/bin
# What the ablations work on: a small story model, {"text"} rows, and the demo's base model.
STORY_MODEL ?= ../shared/models/stories260K
STORIES ?= ../shared/data/tinystories/train.jsonl
DEMO_MODEL ?= $(HOME)/.cache/tandem/SmolLM2-135M-Instruct
# How many inputs the fuzz run damages.
CASES ?= 2000
# How often each process of a run over Ray is struck.
TIMES ?= 1
# More for the benchmark, such as --vllm-python PATH or --only "decoding float32".
BENCH ?=
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help demo demo-seeds oracles calibrate ablation-stories ablation-demo study faults fuzz streaming bench plan-check \
	plan-curves screenshots cluster-faults test test-long test-vllm test-ray lint format examples clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

.venv/ready: pyproject.toml constraints.txt scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh .venv

demo: .venv/ready ## RLHF on a laptop: reward model, then policy and value model together
	$(BIN)/tandem demo

demo-seeds: .venv/ready ## the demo on three seeds, side by side in docs/results/demo.md
	for seed in 0 1 2; do $(BIN)/tandem demo --seed $$seed --run-dir runs/demo-seed-$$seed || exit 1; done
	$(BIN)/python benchmarks/demo_seeds.py runs/demo-seed-0 runs/demo-seed-1 runs/demo-seed-2

oracles: .venv/ready ## joint optimisation against exact solutions, on three seeds: docs/results/oracles.md
	PYTHONPATH=benchmarks $(BIN)/python -m oracles

ablation-stories: .venv/ready ## options of the joint stage on a story model: docs/results/ablation-stories.md
	PYTHONPATH=benchmarks $(BIN)/python -m ablation stories $(STORY_MODEL) $(STORIES)

ablation-demo: .venv/ready ## the same on the demo's task, after make demo-seeds: docs/results/ablation-demo.md
	PYTHONPATH=benchmarks $(BIN)/python -m ablation demo $(DEMO_MODEL) $(wildcard runs/demo-seed-*)

calibrate: .venv/ready ## faults on purpose and healthy runs, judged: docs/diagnosis/calibration.md (an hour; goes on where it was ended)
	PYTHONPATH=benchmarks $(BIN)/python -m calibration $(STORY_MODEL) $(STORIES) --also $(wildcard runs/demo-seed-*/ppo) \
		$(filter-out %sharing-head% %td-0%,$(wildcard runs/ablation/stories/*-?))

study: .venv/ready ## PPO, A2C, DPO and best-of-n at equal KL, after make demo-seeds: docs/results/study.md (an hour; goes on where it was ended)
	PYTHONPATH=benchmarks $(BIN)/python -m study $(DEMO_MODEL) $(wildcard runs/demo-seed-*)

faults: .venv/ready ## end real runs in every known way and see what is lost: docs/reliability.md (15 minutes)
	PYTHONPATH=benchmarks $(BIN)/python -m faults

cluster-faults: .venv-ray/ready ## kill each kind of process of runs over Ray, TIMES each: docs/results/cluster-faults.md
	PYTHONPATH=benchmarks .venv-ray/bin/python -m faults.cluster $(TIMES)

fuzz: .venv/ready ## damaged recipes and data files, CASES of them: docs/results/fuzz.md
	PYTHONPATH=benchmarks $(BIN)/python -m fuzz $(CASES)

plan-check: .venv/ready ## the planner against real joint steps: docs/results/plan.md (15 minutes; PLAN=--go-on: only what was unsteady)
	PYTHONPATH=benchmarks $(BIN)/python -m plan_check $(STORY_MODEL) $(PLAN)

plan-curves: .venv/ready ## 1B to 70B on 1 to 1,024 GPUs, planned: docs/results/scaling.md
	PYTHONPATH=benchmarks $(BIN)/python -m plan_check.curves

streaming: .venv/ready ## memory and start-up against the size of the data: docs/results/streaming.md (two minutes)
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/streaming.py docs

screenshots: .venv/ready ## the pictures of docs/viewing.md, after make demo
	$(BIN)/python benchmarks/screenshots.py runs/demo/ppo

.venv-trl/ready: constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet trl==1.12.0 torch==2.13.0
	touch $@

bench: .venv/ready .venv-trl/ready ## speed against TRL 1.12 and transformers: docs/performance.md (40 minutes, an idle machine)
	$(BIN)/tandem bench --growth --out docs --trl-python .venv-trl/bin/python $(BENCH)

test: .venv/ready ## the test suite
	$(BIN)/python -m pytest -m "not long"

test-long: .venv/ready ## the longest tests: pipelines and processes that end and go on, compiled layers, an oracle
	$(BIN)/python -m pytest -m long

.venv-ray/ready: pyproject.toml constraints.txt scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh .venv-ray demo,dev,ray

test-ray: .venv-ray/ready ## runs over real Ray processes, each kind of which is killed; in an environment of its own
	.venv-ray/bin/python -m pytest -n 0 tests/test_ray.py

.venv-vllm/ready: pyproject.toml constraints.txt scripts/install_vllm.sh
	PYTHON=$(PYTHON) sh scripts/install_vllm.sh .venv-vllm

test-vllm: .venv-vllm/ready ## the tests of the vLLM generator, over Ray too, in an environment (4 GB) that it makes itself
	.venv-vllm/bin/python -m pytest -n 0 tests/test_generator.py
	.venv-vllm/bin/python -m pytest -n 0 tests/test_vllm.py
	.venv-vllm/bin/python -m pytest -n 0 tests/test_vllm_ray.py

lint: .venv/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

examples: .venv/ready ## run every example but the servers, which would not end
	@for file in $(filter-out %_server.py,$(wildcard examples/*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove the environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
