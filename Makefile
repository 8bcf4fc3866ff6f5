# The project's commands. `make help` lists them; `make demo` and `make test` do all the set-up themselves.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO  := build/reference-onnxruntime-fp32
PEERS := latency compression
# Processes of `make test`, of about 3 GB each: tracing a network for export keeps one core busy, never two.
WORKERS := 2

# Overridable on the command line: the interpreter to make .venv with, more arguments for pip, and the index of
# PyTorch's CPU builds, which Linux without an NVIDIA GPU takes torch from (empty: never); see .ci/install_torch.py.
PYTHON      ?=
PIP_ARGS    ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint slow large gpu fuzz peers clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with all that build, run and test need on a CPU (needs Python 3.11+ alone)

demo: $(STAMP) ## build the reference model for ONNX Runtime and generate a grid of images
	$(BIN)/python -m deploy build --target onnxruntime -o $(DEMO)
	$(BIN)/python -m deploy generate $(DEMO) --prompts deploy/reference_models/demo_prompts.txt --grid 4 -o build/demo.png
	@printf '\n  image  %s\n  report   %s\n' build/demo.png $(DEMO)/report/report.html

test: lint ## lint, types, direction of imports, tests
	$(BIN)/pytest --numprocesses=$(WORKERS) --dist=loadfile --durations=15

lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

slow: $(STAMP) ## the tests that take minutes or make virtual environments of their own
	$(BIN)/pytest -m slow

large: $(STAMP) ## pipelines of real size: hours, and tens of GB of disk
	$(BIN)/pytest -m large

# With whatever interpreter and packages are there: a machine with a GPU may have no network to set .venv up from.
gpu: ## what a machine with an NVIDIA GPU can prove, in under 8 minutes
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m tests.gpu

fuzz: $(STAMP) ## generated pipelines and requests against diffusers: CASES=500 SEED=0, or PLANTED=1
	$(BIN)/python -m tests.fuzz $(if $(PLANTED),--planted,$(or $(CASES),500) --seed $(or $(SEED),0))

peers: $(STAMP) ## measure against other projects, each in an environment of its own
	@for peer in $(PEERS); do $(BIN)/python -m tests.peers.$$peer || exit; done

clean: ## remove what was built, and the caches; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find $(wildcard calibration deploy exporters runtimes tests) -name __pycache__ -type d -prune -exec rm -rf {} +

# Touched last, so that an interrupted installation is taken up again. Nothing runs while both files are older.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): some minutes the first time"
	@PYTHONPATH=. $(BIN)/python .ci/install_torch.py '$(TORCH_INDEX)' $(PIP_ARGS)
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) --constraint constraints.txt --editable '.[build,openvino,prune,tensorrt-rtx,serve,ray,telemetry,dev]'
	@touch $@

# 3.11 first: the pinned releases are tested on it. A `python3.12` may be a shim that does not run: each is tried.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        $$python -c 'import ensurepip, venv' 2>/dev/null || { \
	            echo "$$python cannot make virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; }; \
	        $$python -m venv --clear $(VENV) && exit; \
	        rm -rf $(VENV); exit 1; \
	    fi; \
	done; \
	echo "No Python 3.11 or newer found: install one, or name it with make setup PYTHON=/path/to/python" >&2; exit 1
