# make smoke: train a tiny model from nothing. make check: the quick checks (90 CPU seconds). make test: every check but
# those of make test-cluster (whole jobs on several hosts, which are namespaces of this machine: root, Slurm's packages)
# and of make test-full, each of which takes minutes.
# Each creates .venv when it is missing or outdated; the checks add their tools to it.
# On a machine with several Pythons: make test PYTHON=python3.11

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a run needs, and with the tools of the checks. Written last, so an interrupted installation starts again: of a run,
# from an empty environment, without the tools and their stamp too.
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PACKAGES := -c constraints/cpu.txt ./packaging/fbgemm-gpu-cpu
WORKERS ?= 2

.PHONY: smoke check test test-cluster test-full lint venv clean

# Through TorchX, which comes with the tools of the checks: torchx run -s local_cwd launch/components.py:smoke
smoke: $(RUN)
	$(BIN)/gr smoke

# One process: another would load torch again.
check: lint
	$(BIN)/pytest -q --hypothesis-profile=quick -m "not slow and not cluster" tests/architecture tests/unit

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not cluster and not full"

# One job at a time: there are few cores.
test-cluster: $(DEV)
	$(BIN)/pytest -m "cluster and not full" tests/launcher

test-full: $(DEV)
	$(BIN)/pytest -m full

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gr launch
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.serve
	$(BIN)/lint-imports

venv: $(DEV)

$(RUN): pyproject.toml constraints/cpu.txt packaging/fbgemm-gpu-cpu/pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(PACKAGES) -e ".[cpu]"
	$(BIN)/python -m pip check
	touch $@

$(DEV): $(RUN) constraints/torchx-nightly.txt
	$(BIN)/python -m pip install --quiet $(PACKAGES) -e ".[cpu,dev,launch]"
	$(BIN)/python -m pip check
	$(PYTHON) -m venv --clear $(VENV)/torchx-nightly
	$(VENV)/torchx-nightly/bin/python -m pip install --quiet -r constraints/torchx-nightly.txt
	touch $@

clean:
	rm -rf $(VENV) .ruff_cache .mypy_cache .pytest_cache .import_linter_cache .hypothesis
