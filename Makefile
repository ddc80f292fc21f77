# Every target is one line that can be typed by hand; `make help` lists them.
# ARGS="scale=gpu optimizer.lr=3e-3" passes Hydra overrides on.
# Without a GPU, TORCH_INDEX_URL=<the CPU wheel index shown on PyTorch's "Get Started" page> spares the CUDA libraries.
SHELL  := /bin/bash
PYTHON ?= python3
ARGS   ?=
EXTRAS ?= dev,slurm,flower
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
PAPERS := $(patsubst %/train.py,%,$(wildcard */train.py))
export TOKENIZERS_PARALLELISM ?= false
ifdef TORCH_INDEX_URL
PIP_TORCH := --extra-index-url $(TORCH_INDEX_URL)
endif

.DEFAULT_GOAL := help
.PHONY: help setup test lint reproduce sync gpu-check clean

help:  ## list every target
	@grep -hE '^[a-z%<>-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/%/<paper>/' | awk -F ':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'
	@echo "papers here: $(PAPERS)"

setup: $(READY)  ## create or refresh .venv from requirements.lock

$(READY): requirements.lock pyproject.toml
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; set PYTHON=<path>")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(PIP_TORCH) --constraint requirements.lock --editable '.[$(EXTRAS)]'
	@# robust aggregation rules to compare with; its benchmark's torchvision would not import beside every torch
	$(PY) -m pip install --quiet --no-deps --constraint requirements.lock byzfl
	@touch $@

test: $(READY)  ## lint, types, import rules and every test (two workers)
	@$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile common $(PAPERS) $(ARGS)

test-%: $(READY)  ## the tests of one paper
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $* $(ARGS)

lint: $(READY)  ## ruff, mypy and the import rules
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy common $(PAPERS) && $(VENV)/bin/lint-imports

reproduce-%: $(READY)  ## train what is missing, judge every claim, write the report
	$(PY) -m common.reproduce $* $(ARGS)

reproduce: $(READY)  ## every paper, then one page of verdicts (results/index.html)
	@status=0; for paper in $(PAPERS); do $(MAKE) --no-print-directory reproduce-$$paper || status=1; done; $(PY) -m common.summary; exit $$status

bench-%: $(READY)  ## speed tables beside the strongest alternatives
	$(PY) -m $*.bench $(ARGS)

dashboard-%: $(READY)  ## the runs: W&B workspace when logged in, else `wandb leet`
	$(PY) -m common.dashboard $* $(ARGS)

sync: $(READY)  ## upload offline W&B runs
	$(PY) -m common.tracking sync all

gpu-check: $(READY)  ## tests and benches on a real GPU
	$(PY) -m pytest -m "not slow" common $(PAPERS) && for paper in $(PAPERS); do $(PY) -m $$paper.bench device=cuda || exit 1; done

clean:  ## remove .venv and caches; keeps results/
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache; find . -name __pycache__ -type d -prune -exec rm -rf {} +
