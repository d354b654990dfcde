# Each target sets up what it needs; a second run finds it done and starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of torch; on a GPU machine set TORCH=torch (or leave a torch you have installed in $(VENV)).
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1

.PHONY: demo test lint bench clean

# torch comes first: the C++ extension is built against it, and a bare requirement would fetch another build.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(TRITON) numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,bench,dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/robustloss train

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/lint-imports

bench: $(VENV)/.ready
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

clean:
	rm -rf $(VENV) build *.egg-info robustloss/_C*.so
