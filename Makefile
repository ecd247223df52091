# Targets a newcomer needs: quickstart, test. Everything else is listed by `make help`.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.complete
export OMP_NUM_THREADS ?= 1

.PHONY: help setup quickstart test test-unit test-distributed test-versions lint format docs gpu-check check-patches check-stock-scripts \
  upstream-tests benchmarks examples-dry-run slurm-test lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP)  ## create .venv with everything pinned in requirements.lock (repeated calls do nothing)

$(STAMP): requirements.lock pyproject.toml
	@bash .ci/make_venv $(VENV)
	@touch $@

quickstart: setup  ## build a corpus, pretrain a small MoE GPT through real Megatron, resume it, draw the report
	@$(PY) examples/quickstart.py $(QUICKSTART_ARGS)

test: setup  ## lint and all tests (unit, distributed; gpu tests skip themselves without a GPU), on all versions
	@$(MAKE) --no-print-directory lint
	$(PY) -m pytest $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-versions

test-unit: setup  ## the tests that need seconds
	$(PY) -m pytest tests/unit $(PYTEST_ARGS)

test-distributed: setup  ## torchrun + gloo on real Megatron, 2 and 4 processes
	$(PY) -m pytest tests/distributed $(PYTEST_ARGS)

test-versions: setup  ## tests on megatron-core 0.16.1, 0.17.1 and 0.18.2, each a small wheel over this environment
	@bash .ci/test_versions $(VENV) $(PYTEST_ARGS)

lint: setup  ## ruff format check, ruff, mypy, the laws of the house (who imports whom)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m pytest -q -p no:cacheprovider tests/unit/test_laws.py

format: setup  ## rewrite the code in the house format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

gpu-check:  ## the gpu suite on this machine's GPU; writes its rows into docs/verified.md
	@$(if $(wildcard $(PY)),$(PY),python3) .ci/gpu_check.py $(GPU_CHECK_ARGS)

MEGATRON_ARGS = $(if $(MEGATRON),--megatron $(MEGATRON)) $(if $(TAGS),--tags $(TAGS)) $(if $(MAIN),--main $(MAIN))

check-patches: setup  ## MEGATRON=/path/to/Megatron-LM: apply each patch to its tag, train two steps with it
	@$(PY) -m patches.check $(MEGATRON_ARGS)

check-stock-scripts: setup  ## MEGATRON=/path/to/Megatron-LM: each tag's stock scripts through the launcher
	@$(PY) -m patches.stock_scripts $(MEGATRON_ARGS)

upstream-tests:  ## Megatron's own MoE unit tests against our router: MEGATRON=/path/to/Megatron-LM [UPSTREAM_ARGS=...]
	@$(if $(MEGATRON),,echo "Use: make upstream-tests MEGATRON=/path/to/Megatron-LM (a checkout)" >&2; exit 2;) \
	  $(if $(wildcard $(PY)),$(PY),python3) -m tests.upstream.run "$(MEGATRON)" $(UPSTREAM_ARGS)

benchmarks:  ## every level of the benchmark suite, on this machine's GPU or with the CPU backend (benchmarks/README.md)
	@$(if $(shell command -v nvidia-smi),,MEGATRON_ET_CPU=1) $(if $(wildcard $(PY)),$(PY),python3) -m benchmarks run all $(BENCHMARK_ARGS)

examples-dry-run: setup  ## every model example with every router and precision, judged by Megatron's own checks
	@$(PY) -W ignore examples/dry_run.py $(EXAMPLES)

slurm-test: setup  ## a real SLURM of two nodes on this machine: train, preempt, requeue, resume, compare bitwise
	@$(PY) -m tests.slurm.preempt_and_resume $(SLURM_ARGS)

docs: setup  ## write docs/flags.md and the README's picture again
	$(PY) docs/flags.py
	$(PY) docs/picture.py

lock: setup  ## resolve requirements.lock again (needs uv on the PATH)
	uv pip compile pyproject.toml --extra dev -c constraints.txt --python-version 3.12 \
	  --no-emit-package megatron-et --no-header --upgrade -o requirements.lock

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .layers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
