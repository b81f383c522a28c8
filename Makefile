PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: plan test check format clean

plan: $(VENV)/installed  ## set everything up and plan a real model
	$(BIN)/meshwright plan llama3-70b 64xH100 --seq-len 8192 --global-batch-size 512

test: $(VENV)/installed-dev  ## set everything up and run all tests
	$(BIN)/pytest

check: $(VENV)/installed-dev  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[runtime,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
