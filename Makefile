# Every target makes .venv by itself the first time: Python 3.11 or later and make are all it needs.

# The interpreter that .venv is made with: `make test PYTHON=/path/to/python`, or else the first of these that will do.
PYTHON ?=
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)

VENV := .venv
RUN := $(VENV)/bin/python -m
PYTEST := $(RUN) pytest --durations=10
PIP := $(RUN) pip --disable-pip-version-check --quiet

# OpenAI's published dVAE and dalle_pytorch, for the parity tests and benchmarks. Installed without their dependencies, which would bring
# torchvision, blobfile, taming-transformers and others for functions that no test calls; so their versions stand here, not
# in requirements.lock.
DALL_E := DALL-E==0.1 dalle-pytorch==1.6.6 axial-positional-embedding==0.3.12

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-accelerator check parity benchmark lock clean
.NOTPARALLEL:
.SUFFIXES:

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.base  ## train the small systems on the embedded data and draw their pictures
	@$(RUN) scripts.demo

test: $(VENV)/.dev  ## the fast tests
	@$(PYTEST) -m "not slow and not parity" -n 2 --dist=worksteal

test-slow: $(VENV)/.dev  ## the slow tests: killed runs, many devices and processes, the TPU compiler, the demo and the notebook at debug size
	@$(PYTEST) -m slow -n 2 --dist=worksteal

test-accelerator: $(VENV)/.dev  ## the tests that need a GPU or TPU, where there is one (with the `cuda` or `tpu` extra)
	@TESSERA_TESTS_ACCELERATOR=1 $(PYTEST) -m accelerator tests/test_accelerator.py

check: $(VENV)/.dev  ## lint, formatting, types
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) basedpyright

parity: $(VENV)/.parity  ## compare with other projects' code (installs torch)
	@$(PYTEST) tests/parity -n 2 --dist=worksteal

benchmark: $(VENV)/.parity  ## time this project beside others, and write the table (ARGS="--rows=dalle --clock=processor")
	@$(RUN) scripts.benchmark --suite=cpu $(ARGS)

# requirements.lock constrains versions, so that a stamp installs no more than it is for. A stamp is touched last.
# INCOMPLETE exists while an environment is being made or added to. If it is found, the last attempt was cut short, and
# since pip takes half a package for a whole one, the environment is made anew. An error that pip reports itself
# (status 1: no network, say) leaves the environment as it was.
INCOMPLETE := $(VENV)-incomplete

$(VENV)/.base: EXTRAS :=
$(VENV)/.base: TIME := 2 to 6 minutes
$(VENV)/.dev: EXTRAS := [dev,drawings]
$(VENV)/.dev: TIME := 2 to 6 minutes
$(VENV)/.dev: ALSO := $(VENV)/.base
$(VENV)/.parity: EXTRAS := [dev,drawings,parity]
$(VENV)/.parity: TIME := 3 to 15 minutes
$(VENV)/.parity: ALSO := $(VENV)/.base $(VENV)/.dev
$(VENV)/.parity: THEN := && $(PIP) install --no-deps $(DALL_E)
$(VENV)/.parity: Makefile

$(VENV)/.base $(VENV)/.dev $(VENV)/.parity: $(VENV)/bin/python setup.py requirements.lock
	@echo "installing tessera-jax$(EXTRAS) into $(VENV) (about $(TIME), once)"
	@mkdir -p $(INCOMPLETE)
	@{ $(PIP) install -c requirements.lock -e '.$(EXTRAS)' $(THEN); } || \
	  { status=$$?; [ $$status -ne 1 ] || rmdir $(INCOMPLETE); exit $$status; }
	@touch $(ALSO) $@ && rmdir $(INCOMPLETE)

ifneq ($(wildcard $(INCOMPLETE)),)
.PHONY: $(VENV)/bin/python
endif

$(VENV)/bin/python:
	@$(FIND_PYTHON); mkdir -p $(INCOMPLETE); "$$python" -m venv --clear $(VENV)

# Debian packs venv and ensurepip apart from Python, and a shim can be on PATH without its Python: so try, not look.
define FIND_PYTHON
for python in $(PYTHONS) ""; do \
  "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && break; \
done; \
[ -n "$$python" ] || \
  { echo "error: no Python 3.11 or later with venv among: $(PYTHONS) (try make PYTHON=/path/to/python)" >&2; exit 1; }
endef

lock:  ## write requirements.lock from setup.py, keeping versions that still fit (ARGS=--upgrade: the newest)
	@$(FIND_PYTHON); folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
	  echo "resolving (about 1 minute)" && \
	  "$$python" -m venv "$$folder" && \
	  "$$folder/bin/python" -m pip --disable-pip-version-check --quiet install uv && \
	  "$$folder/bin/uv" pip compile --quiet --universal --python-version 3.11 --extra dev --extra drawings --extra parity \
	    --extra cuda --extra tokamax --custom-compile-command "make lock" $(ARGS) setup.py -o requirements.lock

clean:  ## remove .venv and what the tools left
	rm -rf $(VENV) $(INCOMPLETE) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
