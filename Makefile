# Everything runs in .venv/, which tools/bootstrap makes and keeps up to date.
MODEL ?=
ARGS ?=
# Asked for the CPU build of torch where there is no NVIDIA driver; skipped where it cannot be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help build serve test check format bench gpu-check lock dist clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

build: ## make .venv with everything pinned, and the extension
	@tools/bootstrap runtime

serve: ## build and serve MODEL (default: the built-in model); ARGS go to the server
	@tools/bootstrap runtime
	@exec .venv/bin/python -m k2hybrid.server $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: ## build and run all tests; ARGS go to pytest (ARGS=--slow adds those that take minutes)
	@tools/bootstrap test
	@tools/test $(ARGS)

check: ## lint, formatting and types
	@tools/bootstrap dev
	@tools/check $(ARGS)

format: ## rewrite Python and C++ files to the checked format
	@tools/bootstrap dev
	@tools/check --fix

bench: ## prefill and decode tokens/s of MODEL with their share of the memory limit
	@tools/bootstrap runtime
	@.venv/bin/k2hybrid bench $(if $(MODEL),"$(MODEL)") $(ARGS)

gpu-check: ## every GPU test and bench in one command; says so where there is no GPU
	@tools/bootstrap test
	@.venv/bin/python tools/gpu_check $(ARGS)

lock: ## pin requirements.lock to what .venv has now
	@.venv/bin/python tools/lock

dist: ## wheel and source distribution into dist/
	@tools/bootstrap dev
	@.venv/bin/python -m build --no-isolation

clean: ## remove everything built
	rm -rf .venv build dist *.egg-info k2hybrid/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
