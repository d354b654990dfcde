# Each target sets up what it needs; a second run finds it done and starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What is installed where $(VENV) has no torch yet. Elsewhere than on a machine whose index holds a CPU build, this is the
# CUDA build; for another, put it into $(VENV) first or name it: make TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# The release that goes with that torch; the CUDA build of torch brings it by itself, and other systems than Linux lack it.
TRITON ?= $(if $(filter Linux,$(shell uname)),triton==3.7.1)

.PHONY: demo test test-slow lint docs bench clean

# torch comes first: the C++ extension is built against it, and a bare requirement would fetch another build.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON) numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,bench,docs,dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/robustloss train

# As many workers as cores, and so one thread in each.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What takes minutes: every property on many new cases, every kernel compiled for every GPU.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/lint-imports

# The site, in docs/_build/html; a warning is an error, as in tests/docs/test_build.py.
docs: $(VENV)/.ready
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "$(CURDIR)/docs/_build/html/index.html"

# Prints; make bench RESULTS=bench/results also keeps the results there, and goes on from what is there.
bench: $(VENV)/.ready
	$(BIN)/python -m pytest bench -q $(if $(RESULTS),--results $(RESULTS))

clean:
	rm -rf $(VENV) build *.egg-info robustloss/_C*.so
