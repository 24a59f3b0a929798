# Every target sets up what it needs, in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quality test test-benchmarks test-slow test-integration test-frameworks mutation quickstart quickstart-real quality-run quality-report \
	base-model real-base architectures peer-suite docs clean
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' Makefile

setup: .venv/ready  ## .venv, with everything that the other targets need

.venv/ready: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quality: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## the package's tests
	$(BIN)/python -m pytest -n 2 --ignore=tests/benchmarks -m 'not slow and not integration'

test-benchmarks: setup  ## the benchmarks' own tests
	$(BIN)/python -m pytest -n 2 -m 'not slow' tests/benchmarks

test-slow: setup  ## the tests that take long
	$(BIN)/python -m pytest -m slow

test-integration: setup  ## with TRL, DeepSpeed, torchao and a server; two processes on this machine
	$(BIN)/python -m pytest tests/integration

FRAMEWORKS := lightning lm_eval ray sentence_transformers
test-frameworks: .venv-frameworks/ready  ## with Lightning, lm-eval, Ray and Sentence Transformers, in .venv-frameworks
	.venv-frameworks/bin/python -m pytest $(FRAMEWORKS:%=tests/integration/test_%.py)

.venv-frameworks/ready: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-frameworks/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[frameworks]'
	touch $@

mutation: setup  ## deliberate faults in the package, and which of them its tests find; may be stopped and called again
	nice $(BIN)/python -m tests.mutation

quickstart: setup  ## real images, the shipped base: two HiFICL adapters beside LoRA, save, reload, switch
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.quickstart --out out/quickstart

quickstart-real: real-base  ## two tasks on a real language model: answers before and after, saved, reloaded, switched
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.quickstart.real --out out/quickstart_real

quality-run: setup  ## what is not yet in benchmarks/results/quality, and costs anew; may be stopped and called again
	$(BIN)/python -m benchmarks.quality run
	$(BIN)/python -m benchmarks.quality trials
	$(BIN)/python -m benchmarks.quality costs

quality-report: setup  ## the report of what is in benchmarks/results/quality
	$(BIN)/python -m benchmarks.quality report

base-model: setup  ## a sibling of the shipped base model, from nothing
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.base_model.train --threads 2 --out out/base_model
	$(BIN)/python -m benchmarks.base_model.evaluate --model out/base_model/model

real-base: setup  ## download a real language model and the data of its tasks, into out/real_base
	$(BIN)/python -m benchmarks.real_base prepare

docs: setup  ## the documentation site, in out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

architectures: setup  ## rewrite docs/architectures.md from the tests' own table
	$(BIN)/python -m tests.architectures

peer-suite: setup  ## PEFT's own tests with HiFICLConfig in the place of its methods: docs/peer-suite.md
	$(BIN)/python -m tests.peer_suite

clean:  ## remove both .venvs, out/ and all caches
	rm -rf .venv .venv-frameworks .peer-suite out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
