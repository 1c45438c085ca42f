# Every target sets up .venv by itself, from nothing; the second time that costs nothing.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# The first that runs; pyproject.toml says which versions will do.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c pass 2> /dev/null; then echo $$p; break; fi; done)
# Asked for torch's CPU build only where the configured package index does not have it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
READY := $(VENV)/.ready
# What cannot share an environment with vLLM, or need not: .ci/tools.txt.
TOOLS := $(VENV)/tools
TOOLS_READY := $(TOOLS)/.ready
NODE_CLIENT := tests/server/conformance
NODE_READY := $(NODE_CLIENT)/node_modules/.package-lock.json
# The service that pip-audit asks about each package.
OSV := https://api.osv.dev

# Seconds after which a test is ended, with its name.
export PYTEST_TIMEOUT ?= 900

.PHONY: check unit demo test lint audit setup browser
.DEFAULT_GOAL := test

demo: setup
	$(PY) -m raee_serve.evaluation.demo

# One thread a process: BLAS threads that wait for each other spin, beside another process for ever.
unit: setup $(TOOLS_READY) $(NODE_READY) browser
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -m unit --numprocesses 2 --dist loadfile

# Lint, types and unit tests: what to run before each commit.
check: lint unit

# Everything that needs no GPU. Engines and servers have the machine to themselves.
test: unit
	$(PY) -m pytest -m "not gpu and not unit"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

audit: setup $(TOOLS_READY)
	@if curl --silent --output /dev/null --max-time 5 $(OSV); then \
		$(TOOLS)/bin/pip-audit --vulnerability-service osv --progress-spinner off \
			--path $(VENV)/lib/python3.*/site-packages; \
	else echo "audit: nothing was audited, for $(OSV) cannot be reached from here"; fi

# For the tests of the page at /raee, which are skipped where it cannot be had.
browser:
	@if ! command -v chromium > /dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive \
			apt-get install -q -y --no-install-recommends chromium; } || \
		echo "chromium could not be installed; the tests that need it are skipped"; fi

setup: $(READY)

$(READY): pyproject.toml .ci/requirements.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes some minutes."
	$(PY) .ci/requirements.py bare > $(VENV)/bare.txt
	$(PIP) --quiet --no-deps -r $(VENV)/bare.txt
	$(PY) .ci/requirements.py rest > $(VENV)/rest.txt
	$(PIP) -r $(VENV)/rest.txt || $(PIP) --extra-index-url $(TORCH_CPU_INDEX) -r $(VENV)/rest.txt
	$(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2> /dev/null
	PYTHONWARNINGS=ignore $(PIP) --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Compiled when first used: of most of it the tests run little.
$(TOOLS_READY): .ci/tools.txt $(READY)
	test -x $(TOOLS)/bin/python || $(PY) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -r .ci/tools.txt
	touch $@

$(NODE_READY): $(NODE_CLIENT)/package-lock.json
	@if command -v npm > /dev/null; then npm ci --prefix $(NODE_CLIENT) --ignore-scripts --no-fund; \
	else echo "npm is not here: what the SDK for Node gets will not be tested"; fi
