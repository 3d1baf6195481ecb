# Targets for working on graftlm; each makes what it needs. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEVELOP := $(VENV)/.develop

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-device check docs pages bench real pretrain clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

# One installation for tests, checks and docs, in the clone; made again when what it is made from changes.
$(DEVELOP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(DEVELOP) ## install graftlm and everything for working on it into .venv

test: $(DEVELOP) ## run the tests (minutes)
	$(BIN)/pytest -n auto

test-slow: $(DEVELOP) ## run the tests that take long: real trainings, every block of the docs
	$(BIN)/pytest -m slow

test-device: $(DEVELOP) ## run the tests that need an accelerator
	$(BIN)/pytest -m device

check: $(DEVELOP) ## lint, format, types, floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEVELOP) ## check that generated pages are current, and build the docs into site/
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

pages: $(DEVELOP) ## write the generated pages of the docs again
	$(BIN)/python docs/generate.py

bench: $(DEVELOP) ## measure speed and memory
	@if [ -d benchmarks ]; then $(BIN)/python -m benchmarks; else echo "there are no benchmarks yet"; fi

real: $(DEVELOP) ## train every task on real data and write docs/results.md
	$(BIN)/python -m benchmarks.real
	$(BIN)/python docs/generate.py

pretrain: $(DEVELOP) ## train the bundled base again: TEXT=folder OUT=folder MINUTES=60
	$(BIN)/python scripts/pretrain.py $(TEXT) -o $(OUT) --minutes $(or $(MINUTES),60)

clean: ## remove what was built; .venv and runs/ stay
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests docs scripts -name __pycache__ -type d -prune -exec rm -rf {} +
