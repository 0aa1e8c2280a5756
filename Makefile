# The way in. `make` alone lists what there is; everything runs from .venv, which `make setup` makes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test test-arm test-targets lint types unit contract integration e2e faults chaos docs docs-check deb lock clean
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# The environment is known by what goes into it: a changed lock, a changed pyproject.toml or a moved clone makes it again.
KEY := $(shell { cat requirements/dev.txt */pyproject.toml; pwd; } | sha256sum | cut -c1-16)
READY := .venv/.ready-$(KEY)
BIN := .venv/bin
PYTHON ?= $(shell scripts/find-python)
# As many at once as there are processors. A file stays in one process, because its tests share what is costly to start, and files keep
# their order, so that none runs behind one that it does not run behind by itself.
WORKERS ?= $(shell nproc)
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-zA-Z0-9%_-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## install what the demo needs: mosquitto, and .venv with everything at its locked hash
	@scripts/setup-system demo $(BIN)/python

$(READY):
	@test -n "$(PYTHON)"
	scripts/setup-system demo "$(PYTHON)"
	"$(PYTHON)" -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e shared -e agent -e controller
	@touch $@

setup-test: setup ## the same, and what the tests need: systemd-analyze, docker-compose, PostgreSQL, strace
	@scripts/setup-system test $(BIN)/python

demo: setup ## the whole story on this machine: compile, sign, roll out, swap under load, undo
	$(BIN)/fleet demo --report demo-report.json

test: setup-test ## everything that must be green, from lint to the short demo
	@for stage in lint types docs-check unit contract faults integration e2e; do \
	  echo "== $$stage"; SECONDS=0; $(MAKE) --no-print-directory $$stage; echo "== $$stage: $$SECONDS s"; \
	done

test-arm: setup ## real acceptance in Debian userlands for Arm, by qemu; the first run makes them (some minutes)
	@scripts/setup-system arm $(BIN)/python
	$(BIN)/python -m pytest -q -rs tests/arm

test-targets: setup ## compile by the large toolchains, IREE, RKNN, TensorRT-RTX, ncnn, hls4ml, torch, TensorFlow; installs them first (7 GB, some minutes)
	$(BIN)/python -m pytest -v -rs --durations=0 --durations-min=1 tests/targets

lint: $(READY) ## ruff (rules and format) and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY) ## mypy, strict
	$(BIN)/mypy -p edgefleet_shared -p edgefleet_agent -p edgefleet_controller
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/mypy docs/generate.py docker/healthcheck.py docker/broker_settings.py agent/debian/build.py

unit: $(READY) ## pure tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests/unit

contract: $(READY) ## one suite per port, on every adapter
	$(BIN)/python -m pytest -q $(PARALLEL) tests/contract

faults: setup-test ## power cuts, kills, disks that refuse or are full: the bounded part of make chaos
	$(BIN)/python -m pytest -q $(PARALLEL) tests/chaos

chaos: setup-test ## all of them, half an hour or so; the last line counts states, faults, failures
	cd tests && ../$(BIN)/python -m chaos

integration: setup-test ## real mosquitto, PostgreSQL, engines, units
	$(BIN)/python -m pytest -q $(PARALLEL) tests/integration

e2e: setup ## the real programs, and the demo in its short form
	$(BIN)/python -m pytest -q tests/e2e

docs: $(READY) ## write docs/generated/ again from the code
	$(BIN)/python docs/generate.py

docs-check: $(READY) ## fail when docs/generated/ is not what the code says
	$(BIN)/python docs/generate.py --check

bench-%: setup ## run benchmarks/%.py: bench-swap, ...; a table here, figures in build/bench/
	$(BIN)/python benchmarks/$(subst -,_,$*).py

deb: $(READY) ## build the board's Debian packages into dist/: agent and runtime, and one package per engine
	$(BIN)/python agent/debian/build.py --out dist

lock: ## resolve requirements/*.in again (scripts/lock --upgrade takes newer versions)
	scripts/lock

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache demo-report.json
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf
