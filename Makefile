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

.PHONY: help venv demo test test-gpu test-slurm quality format bench-smoke clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## Set up .venv with the pinned versions and nothing else

# Installed again only when the pins or the package's description change; a failed installation leaves no stamp.
$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh tools/install_torch.py
	@rm -f $@
	@tools/make_venv.sh $(VENV)
	@touch $@

demo: $(STAMP) ## Train, evaluate and use a small reward model here, without downloads (outputs/demo)
	@$(PY) -m rm_scale.launch.demo --output_dir outputs/demo

test: $(STAMP) ## Run all tests that need no GPU and no cluster
	@$(PYTEST) -m "not gpu and not slurm" tests

test-gpu: $(STAMP) ## Run the tests that need a CUDA device
	@$(PYTEST) -m gpu tests

test-slurm: $(STAMP) ## Run the tests on a Slurm cluster, by default one of 4 nodes made here (RM_SCALE_SLURM_CLUSTER)
	@tests/slurm/run.sh $(PYTEST)

quality: $(STAMP) ## Lint, check formatting and types, check shell scripts
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/shellcheck --external-sources $(SHELL_SCRIPTS)

format: $(STAMP) ## Fix what ruff can fix, and format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench-smoke: $(STAMP) ## Run a small training benchmark, and compare its ratios to TRL with the last ones (5 minutes)
	@$(PY) -m benchmarks.smoke

clean: ## Remove caches and built files; .venv and outputs stay
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache ./*.egg-info
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
