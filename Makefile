# `make run` and `make test` do all of their own set-up: a .venv and pinned packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test test-all check web clean

run: $(VENV)/.ready-run  ## the page: train there, then talk with what is trained (FRESH=1 starts over)
	$(BIN)/qiusuo quickstart $(if $(FRESH),--fresh)

test: $(VENV)/.ready-test check  ## lint, types and the tests that take under ten minutes
	$(BIN)/python -m pytest -n auto -m "not long"

test-all: $(VENV)/.ready-test-all check  ## everything, long tests too
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Qiusuo needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps hold what was installed: another pyproject, constraints or kernel installs again.
NATIVE := $(wildcard native/*.cpp native/*.h)
$(VENV)/.ready-run: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	@echo "Installing Qiusuo into $(VENV) (once; torch is large)"
	$(PIP) -e '.[report,serve,constrain,tasks,data]'
	@touch $@

$(VENV)/.ready-test: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	@echo "Installing Qiusuo and its test tools into $(VENV) (once)"
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.ready-run

$(VENV)/.ready-test-all: $(VENV)/.ready-test
	$(PIP) -e '.[test-all]'
	@touch $@

web:  ## build the page's assets from web/ (needs Node; the built ones are in the repository)
	cd web && npm ci --silent && npm run check && npm run build

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/qiusuo/kernels/_native*
