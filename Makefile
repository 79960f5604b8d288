# Every target sets up .venv by itself; `make demo` and `make test` are the two to know.

BIN := .venv/bin
ARGS ?=

# Some environments switch bytecode caching off; a dozen processes that import torch would each compile it anew.
unexport PYTHONDONTWRITEBYTECODE
export PYTHON

# A demo whose make is killed (SIGKILL included) ends like one that is interrupted.
WITH_MAKE := $(if $(shell command -v setpriv),setpriv --pdeathsig TERM)

.PHONY: help setup demo test proof check bench bench-gpu control lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv from requirements.lock
	@sh infra/setup.sh

demo: setup ## the whole path on real servers and a small real data set
	@$(WITH_MAKE) $(BIN)/stockpot demo $(ARGS)

test: setup ## all tests but the slowest, real servers included
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

proof: setup ## the slow proofs, such as a demo killed again and again
	@$(BIN)/python -m pytest -m "slow or proof" $(ARGS)

check: setup ## format, lint, types, import rules, infra files
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/hadolint infra/Dockerfile
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec infra/compose.yaml

bench: setup ## measured ratios into .stockpot/bench.json
	@$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: setup ## the same on a GPU
	@$(BIN)/python -m benchmarks --gpu $(ARGS)

control: setup ## recompute the demo's control table
	@$(BIN)/python -m deployments.demo.control

lock: setup ## remake requirements.lock (UPGRADE=--upgrade for the newest versions)
	@$(BIN)/uv pip compile pyproject.toml --group dev --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet $(UPGRADE) --output-file requirements.lock

clean: ## delete everything that set-up, tests and runs made
	@if [ -x $(BIN)/stockpot ]; then $(BIN)/stockpot stack down; fi
	@rm -rf .venv .stockpot build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
