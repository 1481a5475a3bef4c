# `make demo` and `make test` are each the only command needed on a machine that has
# make and Python 3.11 or newer: they create .venv, install into it and run.
#
#   make test PYTEST_ARGS="-k laws -x"    a part of the tests
#   make demo PYTHON=python3.12           another interpreter (before .venv exists)

VENV ?= .venv
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt

# Compiling takes most of the time and one core, so a worker on each core pays.
PYTEST_ARGS ?= -n logical --maxprocesses 4 --dist worksteal
DEMO_ARGS ?= --preset ci --data embedded

.PHONY: help demo gallery test lint format clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo 'make demo     the four label distributions on the MNIST subset in the package'
	@echo 'make gallery  every experiment in small, and GALLERY.md from what they found'
	@echo 'make test     every test, doctest and notebook'
	@echo 'make lint     ruff and pyright'
	@echo 'make format   let ruff mend what it can'
	@echo 'make clean    remove .venv, caches and builds (results/ stays)'

demo: $(VENV)/.experiments
	$(PY) -m experiments.mnist_skews $(DEMO_ARGS)

gallery: $(VENV)/.dev
	$(PY) -m experiments.gallery

test: $(VENV)/.dev
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make the second time quick; dev includes experiments. They go with an
# environment whose interpreter is gone, as after an upgrade of the system.
STAMPS := $(VENV)/.experiments $(VENV)/.dev
_ := $(shell test -x $(PY) || rm -f $(STAMPS))

$(VENV)/.experiments: pyproject.toml constraints.txt | $(PY)
	@echo 'Installing jaxfl[experiments] into $(VENV) ...'
	@$(PIP) -e '.[experiments]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(PY)
	@echo 'Installing jaxfl[experiments,dev] into $(VENV) ...'
	@$(PIP) -e '.[experiments,dev]'
	@touch $(STAMPS)

# Tried by running them: the name alone may be a shim with nothing behind it.
$(PY):
	@old='import sys; sys.exit(sys.version_info < (3, 11))'; \
	bare=; \
	for python in $(PYTHONS); do \
	  $$python -c "$$old" >/dev/null 2>&1 || continue; \
	  $$python -c 'import ensurepip, venv' >/dev/null 2>&1 \
	    || { bare=$$python; continue; }; \
	  echo "Creating $(VENV) with $$($$python --version) ..."; \
	  exec $$python -m venv --clear $(VENV); \
	done; \
	if [ -n "$$bare" ]; then \
	  echo "$$bare has no ensurepip, so it cannot create a virtual environment." >&2; \
	  echo 'On Debian and Ubuntu: sudo apt install python3-venv' >&2; \
	else \
	  echo 'jaxfl needs Python 3.11 or newer; tried: $(PYTHONS).' >&2; \
	  echo 'Name one by PYTHON=/path/to/python3.' >&2; \
	fi; \
	exit 1
