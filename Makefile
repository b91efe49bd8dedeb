# The two commands of the README are `make demo` and `make test`; both set up what they need first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUTPUT ?= output/demo

.PHONY: install demo test soak fuzz lint clean

install: $(VENV)/.ready

$(VENV)/.ready: requirements.lock requirements-detectron2.lock setup.py dev/setup_env.sh
	PYTHON=$(PYTHON) dev/setup_env.sh $(VENV)

demo: install photos
	$(BIN)/python tools/demo.py --output-dir $(OUTPUT)

# The photos of the demo's data. Root on Debian installs the package dataset-fashion-mnist, if the photos are not there
# yet; on other machines, or if that fails, the demo downloads the same files by torchvision.
APT_PHOTOS := DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends dataset-fashion-mnist

.PHONY: photos
photos:
	@if [ ! -d /usr/share/datasets/fashion-mnist ] && [ ! -d "$${DETECTRON2_DATASETS:-datasets}/FashionMNIST/raw" ] \
		&& [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing the Debian package dataset-fashion-mnist"; \
		$(APT_PHOTOS) || { apt-get update -qq && $(APT_PHOTOS); } || echo "It cannot be installed."; \
	fi

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile

# Kills trainings and compares what comes out; about ten minutes.
soak: install
	$(BIN)/python dev/soak.py

# The fuzz tests with thousands of broken data sets, some minutes. `make fuzz SEED=...` repeats a run.
fuzz: SEED := $(or $(SEED),$(shell date +%s))
fuzz: install
	MGD_FUZZ=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz --capture=no --timeout 3600 \
		--hypothesis-seed $(SEED)

lint: install
	PATH="$(abspath $(BIN)):$$PATH" dev/linter.sh

clean:
	rm -rf $(VENV) build *.egg-info
