# The two commands of the README are `make demo` and `make test`; both set up what they need first.
VENV ?= .venv
DOCS_VENV ?= .venv-docs
PYTHON ?= python3
BIN := $(VENV)/bin
OUTPUT ?= output/demo
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: install demo test test-fast soak fuzz lint docs clean

install: $(VENV)/.ready

$(VENV)/.ready: requirements.lock requirements-detectron2.lock pyproject.toml setup.py dev/setup_env.sh
	PYTHON=$(PYTHON) dev/setup_env.sh $(VENV)

demo: install
	dev/install_photos.sh
	$(BIN)/python tools/demo.py --output-dir $(OUTPUT)

test: install
	$(PYTEST) tests $(PARALLEL)

# Leaves out the tests marked slow: under two minutes on two cores.
test-fast: install
	$(PYTEST) tests $(PARALLEL) -m "not slow"

# Kills trainings and compares what comes out; about ten minutes.
soak: install
	$(BIN)/python dev/soak.py

# The fuzz tests with thousands of broken data sets, some minutes. `make fuzz SEED=...` repeats a run.
fuzz: SEED := $(or $(SEED),$(shell date +%s))
fuzz: install
	MGD_FUZZ=nightly $(PYTEST) tests/fuzz --capture=no --timeout 3600 --hypothesis-seed $(SEED)

lint: install
	PATH="$(abspath $(BIN)):$$PATH" dev/linter.sh

# The site in .site/; a warning is an error. It reads the package without importing it, so it needs no torch.
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/.ready: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --requirement requirements-docs.lock
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) .site build *.egg-info
