# The commands of the README. Each sets up what it needs in .venv; a second run does no work twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SETUP := pyproject.toml constraints.txt Makefile

export DYNKIT_WORKSPACE ?= $(CURDIR)/build/workspace

.PHONY: demo test lint docs bench study clean help

help:
	@echo "make demo    set up, replay a year of flights through four pipelines, show what came out"
	@echo "make test    set up, run every check and test"
	@echo "make lint    format, types and import checks only"
	@echo "make docs    build the site into build/docs"
	@echo "make bench   run the benchmarks and print their tables"
	@echo "make study   run the policy study and write its tables into docs/policy-study.md"
	@echo "make clean   remove what was built, .venv included"

$(VENV)/created:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'dynkit needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What the demo needs, and no more.
$(VENV)/demo: $(VENV)/created $(SETUP)
	$(PIP) install --constraint constraints.txt --editable ".[examples]"
	@touch $@

$(VENV)/dev: $(VENV)/demo $(SETUP)
	$(PIP) install --constraint constraints.txt --editable ".[lab,examples,s3,postgres,dev]"
	@touch $@

$(VENV)/docs: $(VENV)/dev $(SETUP)
	$(PIP) install --constraint constraints.txt --editable ".[docs]"
	@touch $@

# Browser tests drive Debian's Chromium.
$(VENV)/chromium:
	@if command -v chromium >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else echo "the browser tests need Chromium; type: sudo apt-get install chromium"; exit 1; fi
	@mkdir -p $(VENV) && touch $@

demo: $(VENV)/demo
	$(BIN)/dynkit batch notebooks/01_quickstart.ipynb -o build/demo --html
	@echo
	$(BIN)/dynkit compare

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/created $(VENV)/dev $(VENV)/chromium lint
	$(BIN)/python -m pytest

docs: $(VENV)/docs
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs
	@echo "site: $(CURDIR)/build/docs/index.html"

$(VENV)/bench: $(VENV)/dev $(SETUP)
	$(PIP) install --constraint constraints.txt --editable ".[bench]"
	@touch $@

# Memory is kept between steps of a training, as in a run's worker (dynkit/pipeline/spawn.py).
bench: $(VENV)/bench
	MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=33554432 $(BIN)/python -m pytest tests/benchmarks --benchmark-enable --benchmark-disable-gc -s -q --override-ini addopts=

study: $(VENV)/dev
	$(BIN)/python tests/benchmarks/policy_study.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
