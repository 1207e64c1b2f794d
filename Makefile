# `make demo` and `make test` work in a bare clone: each makes what it needs, once.

PYTHON ?= python3
TORCH := 2.13.0
PROMPT ?= a red circle bounces and a blue square slides right

BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := $(shell find causalrope_sp kernels -name '*.py' -o -name '*.safetensors' -o -name '*.json')

DOCS := .venv/.docs

.PHONY: install demo test lint format docs wheel-test

install: $(INSTALLED)

# torch comes first and by its exact version, so that where a build for the CPU is on offer pip takes that one and
# fetches no CUDA libraries.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: demo.mp4
	@echo "the video: $(CURDIR)/demo.mp4"

demo.mp4: $(INSTALLED) $(SOURCES)
	$(BIN)/causalrope-sp generate "$(PROMPT)" --out $@

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The first call fetches the tools; the build itself needs no network.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site: $(CURDIR)/build/site/index.html"

$(DOCS): $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

# Builds the wheel, installs it in a fresh environment and generates a video outside the repository.
wheel-test:
	TORCH=$(TORCH) PYTHON=$(PYTHON) scripts/wheel_test.sh
