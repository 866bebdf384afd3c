# make demo and make test need Python 3.11 or newer and make; everything else they install into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs bench soak test-all oldest interrupts clean

demo: .venv/installed
	$(BIN)/python docs/examples/demo.py --keep runs/demo

test: lint
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/mkdocs build --strict

bench: .venv/installed
	$(BIN)/python -m benchmarks

# The checks that are too long for every change, in full.
soak: .venv/installed
	CKPTMGR_SOAK=1 $(BIN)/pytest -m soak -o timeout=3600 -o faulthandler_timeout=3660

# The core tests with the oldest versions that pyproject.toml allows, in an environment of their own.
OLDEST := tests/test_manager.py tests/arrays tests/orbax tests/test_resume.py tests/test_reshard.py tests/trees/test_placement.py \
  tests/saving/test_items.py
oldest: .venv-oldest/installed
	.venv-oldest/bin/pytest $(OLDEST)

.venv-oldest/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -e '.[dev]' -c tests/oldest.txt
	touch $@

# On each of these Pythons, those of pyenv if it is there, in environments of their own with the newest versions that
# pip finds: all tests, and the wheel in an empty environment; then the core tests with the oldest versions.
PYTHONS ?= $(foreach v,3.11 3.12 3.13,$(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python$(v))),python$(v)))
test-all: lint $(foreach python,$(PYTHONS),.venv-$(notdir $(python))/tested) oldest

.venv-%/tested: .venv-%/ready
	.venv-$*/bin/pytest
	CKPTMGR_SOAK=1 .venv-$*/bin/pytest -n 0 -m soak -o timeout=900 tests/test_packaging.py

# A thousand interrupts on each of these Pythons.
interrupts: $(foreach python,$(PYTHONS),.venv-$(notdir $(python))/interrupted)

.venv-%/interrupted: .venv-%/ready
	PYTHONPATH=tests .venv-$*/bin/python -u tests/interrupts.py 1000

.SECONDARY:
.venv-%/ready: pyproject.toml
	$(or $(filter %/$*,$(PYTHONS)),$*) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --upgrade -e '.[dev,bench]'
	touch $@

clean:
	rm -rf .venv .venv-* site

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ckptmgr needs Python 3.11 or newer; name one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	touch $@
