# `make demo` and `make test` set up everything they need in an environment of their own, .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Which Python made the environment and what went into it: changing either makes it anew.
STAMP := $(VENV)/.installed
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# The environment of `make bench`, which has sae-lens too.
PEERS ?= .venv-peers
# The environment of `make test-newest`.
NEWEST ?= .venv-newest
# The environment of `make test-tl4`, and the tests that it runs: those about models, and of what runs them.
TL4 ?= .venv-tl4
TL4_TESTS ?= tests/backends tests/splicing tests/evals tests/testing/test_conformance.py tests/data/test_live_source.py \
	tests/training/test_training.py tests/commands/test_plan.py tests/commands/test_cli_first_steps.py
EXTRAS := [mamba,serve,tagger,wandb,test,docs]

# Hundreds of processes import saekit: without its bytecode each would compile all of it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-processes test-newest test-peers test-tl4 test-triton cuda-bundle lint docs bench clean

demo: $(STAMP)
	$(BIN)/saekit demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -n auto --dist worksteal

# Steps of 2 and of 4 processes against those of one: every architecture that trains, with every mix of options.  And a run
# of which a process is killed at thirty random moments, against one that is left alone.  Then all else of many processes, of
# which `make test` runs a part.
test-processes: $(STAMP)
	SAEKIT_PROCESSES=2 $(BIN)/python -m pytest -n 0 tests/distributed/test_equal_steps.py
	SAEKIT_PROCESSES=4 $(BIN)/python -m pytest -n 0 tests/distributed/test_equal_steps.py
	SAEKIT_PROCESSES=2 SAEKIT_KILLS=30 $(BIN)/python -m pytest -n 0 -s tests/distributed/test_random_kills.py
	SAEKIT_PROCESSES=2 $(BIN)/python -m pytest -n auto --dist worksteal tests/distributed \
		--deselect tests/distributed/test_random_kills.py --deselect tests/distributed/test_equal_steps.py

# The suite against the newest versions that pyproject.toml allows, as they are today; torch stays the tested build, for the
# reason below.
test-newest:
	@echo "Setting up $(NEWEST) with the newest versions: a few minutes."
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-c $(NEWEST)/torch.txt -e '.$(EXTRAS)'
	@echo "other than in constraints.txt:"; $(NEWEST)/bin/python -m pip freeze --disable-pip-version-check \
		--exclude-editable | grep -v '^torch==' | grep -vixFf constraints.txt || true
	$(NEWEST)/bin/python -m pytest -n auto --dist worksteal

# transformer_lens 4, which has no HookedTransformer, and with which mamba-lens does not work; all else as it is tested.
test-tl4:
	@echo "Setting up $(TL4) with transformer_lens 4: a few minutes."
	test -x $(TL4)/bin/python || $(PYTHON) -m venv $(TL4)
	grep -viE '^(transformer|mamba)[-_]lens==' constraints.txt > $(TL4)/tested.txt
	$(TL4)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TL4)/tested.txt torch
	$(TL4)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TL4)/tested.txt 'transformer-lens>=4,<5' \
		-e '.[wandb,test]'
	$(TL4)/bin/python -m pytest -n auto $(TL4_TESTS)

# The step kernels in Triton, in its interpreter on the CPU; Triton is installed into a folder of its own.
TRITON ?= .triton
test-triton: $(STAMP)
	test -d $(TRITON)/triton || $(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(TRITON) 'triton>=3.4'
	PYTHONPATH=$(abspath $(TRITON)) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 0 tests/kernels/test_triton.py

# A folder to copy to a machine with a GPU, torch and Triton, and nothing else: `python run.py` in it tries and times all that
# needs a GPU, in less than eight minutes.  The wheels are those of the environment with the other libraries, but torch's own,
# for the Python and the system that make them; what is not to be had is named and left out.
CUDA_BUNDLE ?= cuda-bundle
CUDA_WHEEL = $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(CUDA_BUNDLE)/wheels
cuda-bundle: $(STAMP) $(PEERS)/.installed
	rm -rf $(CUDA_BUNDLE) && mkdir -p $(CUDA_BUNDLE)/wheels $(CUDA_BUNDLE)/bench $(CUDA_BUNDLE)/tests/kernels
	$(CUDA_WHEEL) .
	{ $(PEERS)/bin/python -m pip freeze --disable-pip-version-check --exclude-editable; \
		grep -E '^(pytest|hypothesis|iniconfig|pluggy|sortedcontainers)==' constraints.txt; } \
		| grep -vE '^(torch|triton|saekit|nvidia[-_].*)(==| @)' | sort -u > $(CUDA_BUNDLE)/wheels.txt
	$(CUDA_WHEEL) -r $(CUDA_BUNDLE)/wheels.txt || while read -r wanted; do \
		$(CUDA_WHEEL) "$$wanted" < /dev/null || echo "left out: $$wanted"; \
	done < $(CUDA_BUNDLE)/wheels.txt
	cp tests/cuda/*.py $(CUDA_BUNDLE) && rm $(CUDA_BUNDLE)/test_run.py
	cp tests/bench/peers.py $(CUDA_BUNDLE)/bench
	cp -r tests/conftest.py tests/support $(CUDA_BUNDLE)/tests
	cp tests/kernels/test_gpu_steps.py tests/kernels/test_triton.py tests/kernels/test_sparse_products.py \
		$(CUDA_BUNDLE)/tests/kernels
	printf '[pytest]\npythonpath = tests\n' > $(CUDA_BUNDLE)/pytest.ini

# The tests that run other libraries beside saekit, in the environments of `make bench`; SAEKIT_SAE_BENCH_PYTHON names one with
# SAEBench, if there is one.
PEER_TESTS ?= $(shell grep -rlE 'SAEKIT_SAE_(LENS|LENS_3|BENCH)_PYTHON' tests --include='test_*.py')
test-peers: $(STAMP) $(PEERS)/.installed $(PEERS)-3/.installed
	SAEKIT_SAE_LENS_PYTHON=$(abspath $(PEERS))/bin/python SAEKIT_SAE_LENS_3_PYTHON=$(abspath $(PEERS)-3)/bin/python \
		$(BIN)/python -m pytest -n auto --dist worksteal $(PEER_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPY_NUM_WORKERS=auto $(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

# Beside other libraries where they can be installed, in environments of their own; what is not to be had is named and
# left out, and so is a bench that fails.  At most MINUTES, beside what setting up takes once.  Tables go into docs/figures/,
# a page for each machine, and docs/performance.md.  MACHINE="..." calls this machine otherwise; ONLY="step live" runs some
# of the benches.
MINUTES ?= 25
bench: $(STAMP)
	@peers=$(PEERS)/bin/python; $(MAKE) --no-print-directory $(PEERS)/.installed || peers=; \
	if $(MAKE) --no-print-directory $(PEERS)-3/.installed; \
	then export SAEKIT_BENCH_SAE_LENS_3=$(PEERS)-3/bin/python; fi; \
	$(BIN)/python tests/bench/run_all.py --peers "$$peers" --minutes $(MINUTES) $(if $(MACHINE),--machine "$(MACHINE)") \
		$(if $(ONLY),--only $(ONLY))

# $(call SAYING,what,command): runs the command, and says every three seconds that it is still at work, since pip is silent
# for minutes where it unpacks.
define SAYING
@echo "$(1) ..."; $(2) & pid=$$!; trap 'kill $$pid' INT TERM; seconds=0; \
while sleep 1; kill -0 $$pid 2> /dev/null; do \
	seconds=$$((seconds + 1)); [ $$((seconds % 3)) -ne 0 ] || echo "  still $(1) ($$seconds s)"; \
done; wait $$pid
endef

# torch goes first, at the tested version: a plain requirement would take a build with gigabytes of CUDA libraries.  A new pip
# finds the versions in half the time of the one that comes with Python 3.11, and bytecode is made by all processors.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once: torch and about 160 packages, 1.9 GB on disk, one to four minutes."
	$(call SAYING,making an environment in $(VENV),test -x $(BIN)/python || $(PYTHON) -m venv $(VENV))
	$(call SAYING,installing a new pip,$(PIP) 'pip>=25')
	$(call SAYING,installing torch,$(PIP) -c constraints.txt torch)
	$(call SAYING,installing saekit and what it needs,$(PIP) -c constraints.txt -e '.$(EXTRAS)')
	$(call SAYING,compiling what was installed,\
		$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true)
	touch $(STAMP)

$(PEERS)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(PEERS) with the other libraries, once: 1.8 GB on disk, two to five minutes."
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . sae-lens==6.54.12
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check natsort schedulefree simple-parsing
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps eai-sparsify==1.3.3
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0
	touch $@

# No other version of sae-lens fits beside 3.0.0, nor does today's torch without these.
$(PEERS)-3/.installed: constraints.txt
	@echo "Setting up $(PEERS)-3 with sae-lens 3.0.0, once: a few minutes."
	test -x $(PEERS)-3/bin/python || $(PYTHON) -m venv $(PEERS)-3
	$(PEERS)-3/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS)-3/bin/python -m pip install --quiet --disable-pip-version-check sae-lens==3.0.0 pyarrow==25.0.1 \
		typeguard==2.13.3 huggingface_hub==0.24.7 transformers==4.46.3 wandb==0.18.7
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(TL4) $(PEERS) $(PEERS)-3 $(TRITON) $(CUDA_BUNDLE) build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
