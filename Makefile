# Two commands set everything up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test lint format constraints wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/installed: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else \
	  f"Python 3.11 or 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@# What is imported is compiled then: that is a quarter of the files, and pip compiles one by one.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
	  -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## train, evaluate, export and promote a recommender on the sample data
	$(BIN)/recsys run --config eshop_clothing --run-dir runs/demo

test: $(VENV)/installed  ## run the tests
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed  ## style, types, import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/installed  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(VENV)/installed  ## resolve every dependency anew into constraints.txt
	$(BIN)/uv pip compile setup.cfg --all-extras --python-version 3.11 --upgrade --no-annotate \
	  --no-header --output-file constraints.txt

wheel: $(VENV)/installed  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

clean:  ## forget the environment and everything built
	rm -rf $(VENV) build dist *.egg-info
