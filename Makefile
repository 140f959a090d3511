# Everything sets up what it needs: a fresh machine has only Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup quickstart test test-all lint types rooms check-imports unit gpu-check bench schema clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch and what tests and checks need, about 1.6 GB; a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

quickstart: setup
	$(BIN)/python scripts/quickstart.py
	@echo "The commands are in $(BIN): source $(BIN)/activate"

test: lint types rooms check-imports unit

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

rooms: setup
	$(BIN)/lint-imports

check-imports: setup
	$(BIN)/python scripts/check_imports.py

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-all: lint types rooms check-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m ''

gpu-check: setup
	$(BIN)/pytest -m cuda
	$(BIN)/python benchmarks/step.py --device cuda
	$(BIN)/python benchmarks/encoder.py --device cuda
	$(BIN)/python benchmarks/attention.py --device cuda --kind vit_h

bench: setup
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/encoder.py
	$(BIN)/python benchmarks/decoder.py

schema: setup
	$(BIN)/samlet schema --out configs/schema.json

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
