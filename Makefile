# Every target sets up what it needs, in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quality test test-slow test-integration mutation quickstart quality-run quality-report base-model \
	architectures peer-suite docs clean
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

test: setup  ## the tests, with coverage
	$(BIN)/python -m pytest -n 2 -m 'not slow and not integration' --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

test-slow: setup  ## the tests that take long
	$(BIN)/python -m pytest -m slow

test-integration: setup  ## with TRL, DeepSpeed and torchao; two processes on this machine
	$(BIN)/python -m pytest tests/integration

mutation: setup  ## deliberate faults in the package, and which of them its tests find; may be stopped and called again
	nice $(BIN)/python -m tests.mutation

quickstart: setup
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.quickstart --out out/quickstart

quality-run: setup  ## what is not yet in benchmarks/results/quality, and costs anew; may be stopped and called again
	$(BIN)/python -m benchmarks.quality run
	$(BIN)/python -m benchmarks.quality trials
	$(BIN)/python -m benchmarks.quality costs

quality-report: setup
	$(BIN)/python -m benchmarks.quality report

base-model: setup
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.base_model.train --threads 2 --out out/base_model
	$(BIN)/python -m benchmarks.base_model.evaluate --model out/base_model/model

docs: setup  ## the documentation site, in out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

architectures: setup  ## rewrite docs/architectures.md from the tests' own table
	$(BIN)/python -m tests.architectures

# PEFT's own tests with HiFICLConfig in the place of LoRA's. docs/peer-suite.md says what is left out and why.
PEFT_VERSION := 0.21.2
PEER_SUITE ?= ../shared/tools/run_peft_suite.py
PEER := $(BIN)/python $(PEER_SUITE) --checkout $(CURDIR)/.peer-suite/peft-$(PEFT_VERSION) --models .peer-suite/models \
	--config peft_hificl:HiFICLConfig --mixed-batches --no-merge --more-decoders
PEER_WITHOUT := not GPTJ and not Deberta and not deberta and not test_disable_adapters \
	and not test_set_adapter_non_overlapping_modules and not test_set_requires_grad
peer-suite: setup .peer-suite/peft-$(PEFT_VERSION)
	$(PEER) --suites decoder,encdec,feature,seqcls,tokqa,custom,config -k '$(PEER_WITHOUT)'
	$(PEER) --suites custom -k test_disable_adapters --kwargs '{"scale_self_attention": false}'
	$(PEER) --suites extra --declare fresh_process_without_import,hotswap,mixed_model,disk_offload --json .peer-suite/extra.json \
		|| $(BIN)/python -c 'import json; failed = [row["id"] for row in json.load(open(".peer-suite/extra.json"))["outcomes"] \
		if row["status"] == "failed"]; print("failed:", failed); assert failed == ["extra::ck_identity_at_init"]'

.peer-suite/peft-$(PEFT_VERSION):
	mkdir -p .peer-suite
	$(BIN)/python -m pip install --quiet setuptools wheel
	$(BIN)/python -m pip download --quiet --no-binary :all: --no-deps --no-build-isolation --dest .peer-suite peft==$(PEFT_VERSION)
	tar -xzf $@.tar.gz -C .peer-suite

clean:  ## remove .venv, out/ and all caches
	rm -rf .venv .peer-suite out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
