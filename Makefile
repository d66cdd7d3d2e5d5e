# make smoke: train a tiny model from nothing. make check: the quick checks (90 CPU seconds). make test: every check but
# those of make test-cluster: whole jobs on several hosts, which are namespaces of this machine (root; Slurm's packages).
# Each creates .venv when it is missing or outdated.
# On a machine with several Pythons: make test PYTHON=python3.11

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so an interrupted installation starts again from an empty environment.
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: smoke check test test-cluster lint venv clean

# In an activated environment: torchx run -s local_cwd launch/components.py:smoke
smoke: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/torchx run -s local_cwd launch/components.py:smoke

# One process: another would load torch again.
check: lint
	$(BIN)/pytest -q --hypothesis-profile=quick -m "not slow and not cluster" tests/architecture tests/unit

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not cluster"

# One job at a time: there are few cores.
test-cluster: $(STAMP)
	$(BIN)/pytest -m cluster tests/launcher

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gr launch
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/lint-imports

venv: $(STAMP)

$(STAMP): pyproject.toml constraints/cpu.txt constraints/torchx-nightly.txt packaging/fbgemm-gpu-cpu/pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt ./packaging/fbgemm-gpu-cpu -e ".[cpu,dev,launch]"
	$(BIN)/python -m pip check
	$(PYTHON) -m venv $(VENV)/torchx-nightly
	$(VENV)/torchx-nightly/bin/python -m pip install --quiet -r constraints/torchx-nightly.txt
	touch $@

clean:
	rm -rf $(VENV) .ruff_cache .mypy_cache .pytest_cache .import_linter_cache .hypothesis
