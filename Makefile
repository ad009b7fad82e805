# make demo and make test are all the set-up there is; both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test slow peers lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Fallline needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/fallline demo

# One worker a core: a test has one thread.
WORKERS ?= --numprocesses logical --maxprocesses 8 --dist loadfile

test: install
	$(BIN)/python -m pytest $(WORKERS)

slow: install
	$(BIN)/python -m pytest $(WORKERS) -m slow

# The tests that compare with optimizers of others, which stay out of .venv: see peers.txt.
peers: install .peers/.installed
	PYTHONPATH=.peers $(BIN)/python -m pytest -m peer tests/optim

.peers/.installed: peers.txt
	rm -rf .peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .peers -r peers.txt
	@touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .peers .pytest_cache .mypy_cache .ruff_cache
