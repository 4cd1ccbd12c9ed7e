# Two commands: `make demo` runs the whole system offline, `make test` proves it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test soak lint benchmarks evidence clean

help:
	@echo "make demo   install into $(VENV), then build, pretrain and evaluate on the embedded world"
	@echo "make test   install into $(VENV), then ruff, mypy and all tests"
	@echo "make soak   kill builds and break stores many times, for some twenty minutes"
	@echo "make evidence   image-only, paper and geolink2 by every task: docs/evidence.md, in 90 minutes"
	@echo "make benchmarks   run every script in benchmarks/ and print its JSON"

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	@echo "==> creating $(VENV) and installing the locked packages (a few GB with torch; minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet "uv==$$(sed -n 's/^# uv==//p' requirements.lock)"
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: install
	@$(BIN)/geolink demo demo

lint: install
	@echo "==> ruff"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@echo "==> mypy"
	@$(BIN)/mypy

test: lint
	@echo "==> pytest"
	@$(BIN)/pytest -n 2 --dist loadfile

soak: install
	@$(BIN)/pytest -m soak -v -s

benchmarks: install
	@for script in $(filter-out %/evidence.py,$(wildcard benchmarks/[a-z]*.py)); do echo "==> $$script"; $(BIN)/python $$script || exit 1; done

evidence: install
	@$(BIN)/python -W ignore benchmarks/evidence.py --folder evidence --workers 2

clean:
	rm -rf demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
