# make run: the whole DAG on MovieLens-100K.  make test: lint, types, contracts, docs, tests.  make docs: work/site.
PYTHON ?= python3.11
BIN := .venv/bin
CONFIG ?= pipeline/examples/movielens.yaml

.PHONY: run serve test lint docs clean

run: .venv/run.installed data/movielens.imported
	$(BIN)/corank run --config $(CONFIG)

serve: .venv/run.installed data/movielens.imported
	$(BIN)/corank run --config $(CONFIG) --serve

test: .venv/dev.installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/dev.installed
	$(BIN)/python docs/config_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

data/movielens.imported: | .venv/run.installed
	$(BIN)/corank import movielens-100k --target data/movielens
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/dev.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/run.installed

clean:
	rm -rf .venv data work
