# `make demo` and `make test` do all the set-up on a machine that has Python 3.10 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# what to test, and with how many processes
TESTS ?= tests
WORKERS ?= 2
# the host's own code and the tests' small networks gain nothing from more threads
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist worksteal

.PHONY: install demo test test-robust test-cluster test-hosts lint docs clean

install: $(VENV)/installed

# once for each state of the metadata; the host comes from the package index. pip compiles it all,
# most of it in vain; but where PYTHONDONTWRITEBYTECODE is set, as in many images, each of the tests'
# hundred processes would compile torch anew
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
	$(PYTEST) $(TESTS)

# what is too long for every change: faults, fuzzing, other launchers
test-robust: install
	$(PYTEST) -m robust $(TESTS)

# a SLURM of two nodes (slurm-wlm and munge, as root), a Ray of two, torchrun on two: one at a time
test-cluster: install
	$(TEST_ENV) $(BIN)/pytest -m cluster tests/experiments/test_cluster.py $(CASES)

# solo-learn's own tests with the add-on active; HOST is a checkout. One of them draws a UMAP
test-hosts: install
	$(BIN)/python -m pip install --quiet --editable '.[umap]'
	$(BIN)/python studies/host_suite.py $(HOST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) demo datasets build site *.egg-info
