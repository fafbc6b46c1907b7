# `make demo` and `make test` do all the set-up on a machine that has Python 3.10 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the host's own code and the tests' small networks gain nothing from more threads
TEST_ENV := OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

.PHONY: install demo test lint clean

install: $(VENV)/installed

# once for each state of the metadata; the host comes from the package index
$(VENV)/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/iecl-solo install-host --from index
	touch $@

demo: install
	$(BIN)/iecl-solo digits datasets/digits
	$(BIN)/iecl-solo compare --config-name digits/simclr compare.dir=demo

test: install
	$(TEST_ENV) $(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo datasets build *.egg-info
