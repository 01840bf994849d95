# `make demo` and `make test` set up everything they need in an environment of their own, .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Which Python made the environment and what went into it: changing either makes it anew.
STAMP := $(VENV)/.installed
# The environment of `make bench`, which has sae-lens too.
PEERS ?= .venv-peers

.PHONY: demo test lint docs bench clean

demo: $(STAMP)
	$(BIN)/saekit demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

# Beside sae-lens where it can be installed, in an environment of its own.
bench: $(STAMP)
	@python=$(PEERS)/bin/python; $(MAKE) --no-print-directory $(PEERS)/.installed || python=$(BIN)/python; \
	for name in startup shuffle live cached memory checkpoint; do \
		echo "== $$name"; $$python -W ignore tests/bench/$$name.py || exit 1; \
	done

# torch goes first, at the tested version: a plain requirement would take a build with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mamba,wandb,test,docs]'
	touch $(STAMP)

$(PEERS)/.installed: pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . sae-lens==6.54.12
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
