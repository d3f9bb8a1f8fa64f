# make train   train the quickstart on this machine; called again, it continues where it stopped
# make test    everything a change must pass
#
# The first call makes .venv; PYTHON=python3.12 chooses its interpreter (3.11 or newer), after "make clean" also later.

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
INSTALLED := $(VENV)/installed

.PHONY: train test lint clean

train: $(INSTALLED)
	$(VENV)/bin/megascale train configs/quickstart.toml --resume

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# torch comes first and by exact version, and is named again beside the package: else another package could pull a
# second, different build of it. pip takes the build it finds first, a local CPU build where it is configured with one.
$(INSTALLED): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11+ is needed: make PYTHON=python3.11")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VENV)/bin/python -m pip install --quiet '$(TORCH)' --editable '.[dev]'
	touch $@

# Runs, prepared corpora and checkpoints stay.
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
