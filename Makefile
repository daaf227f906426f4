# `make demo`: the main job on a fresh machine. `make test`: everything that must hold. Both set up .venv first.
# `make benchmarks`: adds lmms-eval, the official benchmarks' scorer, to .venv; `make benchmarks-test`: what needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test contract docs setup benchmarks benchmarks-test clean

demo: setup
	$(BIN)/effivlm run

# the site with the API reference, into site/; broken references are errors
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python -m pytest -n 2

# every method on every family; `make test` takes a sample of the newer ones
contract: setup
	$(BIN)/python -m pytest -n 2 -m grid

setup: $(VENV)/.installed

# torch first and alone: with it in place nothing pulls a CUDA build onto a machine that has none
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# lmms-eval without its dependencies: they pull torchvision, which breaks transformers beside a CPU torch
benchmarks: $(VENV)/.benchmarks

$(VENV)/.benchmarks: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps lmms-eval==0.7.3
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lmms]'
	touch $@

benchmarks-test: benchmarks
	$(BIN)/python -m pytest tests/test_lmms.py

clean:
	rm -rf $(VENV)
