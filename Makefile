# Every target sets up .venv by itself; nothing outside this folder is changed. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST := $(PY) -m pytest -q --durations=15
SHELL_SCRIPTS = .ci/run $(shell find tools slurm benchmarks tests examples -name '*.sh' -type f 2>/dev/null | sort)

.PHONY: help venv demo test test-all test-compat test-gpu gpu-proof test-slurm quality docs format bench-smoke clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## Set up .venv with the pinned versions and nothing else

# An environment made where there was no GPU holds torch's CPU build: where there is one it is looked at again.
GPU_DEVICE := /dev/nvidia0
CPU_TORCH := $(wildcard $(VENV)/lib/python*/site-packages/torch-*+cpu.dist-info)
ifneq ($(RM_SCALE_TORCH_INDEX)$(and $(wildcard $(GPU_DEVICE)),$(CPU_TORCH)),)
$(STAMP): again
endif
.PHONY: again

# Installed again only when the pins or the package's description change; a failed installation leaves no stamp.
$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh tools/install_torch.py
	@rm -f $@
	@tools/make_venv.sh $(VENV)
	@touch $@

demo: $(STAMP) ## Train, evaluate and use a small reward model here, without downloads (outputs/demo)
	@$(PY) -m rm_scale.demo --output_dir outputs/demo

# One process per core: each test process and each rank that it starts computes on one thread (tests/conftest.py).
TEST_PROCESSES ?= auto
# In the order of the files: tests/distributed and tests/e2e take longest, and must not come last.
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## Run the tests of every promise, in about 10 minutes on 2 cores; no GPU, no cluster
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not long and not gpu and not slurm" tests

test-all: test ## Run those, then the long ones: true shapes, every stage and method, many kills
	@$(PYTEST) $(SIDE_BY_SIDE) -m "long and not gpu and not slurm" tests

test-compat: $(STAMP) ## Run our models in other software: a real vLLM, older TRL (each in an environment of its own)
	@tests/compat/ppo.sh
	@tests/compat/rewardbench.sh
	@tests/compat/openrlhf.sh
	@tests/compat/verl.sh
	@tests/compat/home_scores.sh
	@tests/compat/vllm.sh

test-gpu: $(STAMP) ## Run the tests that need a CUDA device
	@$(PYTEST) -m gpu tests

# No setting up: the machine may have no network. Of the Pythons there, one whose torch sees a GPU is chosen.
gpu-proof: ## Prove and measure on a machine with CUDA in 12 minutes (ARGS="--help"; PYTHON=...; .wheels/)
	@$(or $(PYTHON),$(firstword $(wildcard $(PY)) python3)) -m benchmarks.gpu_proof $(ARGS)

test-slurm: $(STAMP) ## Run the tests on a Slurm cluster, by default two of 4 nodes made here (RM_SCALE_SLURM_CLUSTER)
	@tests/slurm/run.sh $(PYTEST)

quality: $(STAMP) ## Lint, check formatting, types, declared dependencies and shell scripts
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/deptry rm_scale
	@$(VENV)/bin/shellcheck --external-sources $(SHELL_SCRIPTS)

docs: $(STAMP) ## Build the documentation as a site (outputs/site); a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "docs: outputs/site/index.html (its search needs a server: $(PY) -m http.server -d outputs/site)"

format: $(STAMP) ## Fix what ruff can fix, format, and renew the list of modules in docs/architecture.md
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(PY) tools/module_map.py

bench-smoke: $(STAMP) ## Run a small training benchmark, and compare its ratios to TRL with the last ones (5 minutes)
	@$(PY) -m benchmarks.smoke

clean: ## Remove caches and built files; .venv and outputs stay
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache ./*.egg-info
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
