VENV := .venv
PY := $(VENV)/bin/python
# Any Python from 3.11 on makes the environment; PYTHON=python3.12 chooses another.
PYTHON ?= python3
# The CPU build where no GPU is visible; with one, the newest build that PyPI serves.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch" || echo "torch==2.13.0")

# Processes that run tests, of one thread and about 2 GB each. The tests of a file share its fixtures.
PROCESSES ?= 2
IN_PROCESSES := -n $(PROCESSES) --dist loadfile

.PHONY: setup quickstart test slow nightly browser conformance release lint docs format space clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: setup  ## set-up, then the end-to-end demo on the synthetic Shapes dataset
	$(VENV)/bin/pivot quickstart

test: setup  ## the default suite
	$(PY) -m pytest $(IN_PROCESSES)

slow: setup  ## the long tests that the default suite leaves out
	$(PY) -m pytest $(IN_PROCESSES) -m slow

nightly: setup  ## the longest tests, which CI leaves out; run them before a release
	$(PY) -m pytest $(IN_PROCESSES) -m nightly

browser: setup  ## clicks through the Space in Chromium; the default suite does so too where Chromium is installed
	PIVOT_BROWSER=required $(PY) -m pytest -m "browser and (slow or not slow)"

conformance: setup  ## repositories and exports in other software, each in an environment of its own
	$(PY) -m pytest -n $(PROCESSES) --dist loadfile -m conformance -s tests/conformance

release: setup  ## a dry run of a release: built, checked, installed in a clean environment, quickstart; uploads nothing
	$(PY) -m tests.release --torch "$(TORCH)"

lint: setup  ## style, types, and the order of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache --no-logo

docs: setup  ## the documentation site, into site/; fails on a broken link or anchor, needs no network
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

space: setup  ## the app on the shipped models
	$(VENV)/bin/pivot space

clean:
	rm -rf $(VENV) .conformance quickstart runs hub dist site .pytest_cache .mypy_cache .ruff_cache
