# Everything runs in ./.venv; the first call sets it up. Overridable: PYTHON, TORCH (e.g. TORCH="torch==2.11.0"), VENV,
# WORKERS.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
# test processes at once; several ranks of one test share a core well, as they mostly wait for each other
WORKERS ?= 2

BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
READY  := $(STAMPS)/package
CHECKED := kernels profiler ops costmodel schedules plans planner passes runtime shardwright tests tools examples benchmarks

export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint typecheck docs-check bench clean setup
.DEFAULT_GOAL := test

setup: $(READY)

# torch first: it decides which build everything else is resolved against
$(STAMPS)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	mkdir -p $(STAMPS)
	touch $@

$(READY): pyproject.toml $(STAMPS)/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[hf,dev]" "$(TORCH)"
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint typecheck
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal
	$(MAKE) docs-check

# also the repetitions that `make test` leaves out: every model on every layout and schedule, hours on two cores
test-all: lint typecheck
	SHARDWRIGHT_FULL_MATRIX=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

# mypy looks at the package as installed, not at the folders that it is made from. Installing it anew each time also
# proves that a plain `pip install .` works.
typecheck: $(READY)
	rm -rf build/lib build/bdist.* $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --target $(VENV)/installed .
	MYPYPATH=$(VENV)/installed $(BIN)/mypy --config-file pyproject.toml -p shardwright

docs-check: $(READY)
	$(BIN)/python tools/docs_check.py README.md CONTRIBUTING.md docs/*.md

bench: $(READY)
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
