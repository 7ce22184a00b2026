# Everything runs in a virtual environment that is made on first use: VENV=DIR puts it elsewhere.

VENV ?= .venv
PYTHON_IN_VENV = $(VENV)/bin/python

# The checkout comes before what the environment has installed, so that one environment can serve several checkouts.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help install demo test check lock clean

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "variables:"
	@echo "  VENV=DIR       the virtual environment (default: .venv; 11 GB)"
	@echo "  PYTHON=EXE     the Python 3.11 to 3.13 it is made with (default: the first one found)"
	@echo "  MODEL=FAMILY   demo: the model family, see python -m sglang_prfaas.launch demo --help"
	@echo "  KEEP=1         demo: leave everything serving, and print a curl command"
	@echo "  JSON=FILE      demo: also write the table as JSON"
	@echo "  ARGS=...       test: arguments for pytest, such as ARGS='tests/unit -x'"

install: ## Make the virtual environment with SGLang and this project, or bring it up to date.
	@VENV='$(VENV)' PYTHON='$(PYTHON)' scripts/install.sh

demo: install ## Two datacenters on this machine, compared token by token with a single server.
	@$(PYTHON_IN_VENV) -m sglang_prfaas.launch demo \
		$(if $(MODEL),--model '$(MODEL)') $(if $(filter-out 0,$(KEEP)),--keep) $(if $(JSON),--json '$(JSON)')

test: install ## All tests, with real SGLang servers.
	$(PYTHON_IN_VENV) -m pytest $(ARGS)

check: install ## Lint, format, types, import rule.
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) -m pytest -q tests/unit/test_imports.py

lock: install ## Write constraints.txt from the virtual environment.
	VENV='$(VENV)' scripts/lock.sh

clean: ## Remove caches, logs, the demo's files and .venv; an environment elsewhere is left.
	rm -rf .venv .demo .prfaas .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	rm -f sglang_prfaas/transport/_vectored*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
