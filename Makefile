# `make quickstart` and `make test` need nothing but Python 3.11+, pip and make: they create .venv, install what
# requirements/*.txt pin, and do their job. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

python := $(VENV)/bin/python
pip := $(python) -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format contract types check docs docs-generated lock pretrain clean

help:
	@echo "make quickstart   fine-tune the embedded model in three ways (5 minutes on 2 cores) and compare them"
	@echo "make test         the whole test suite; PYTEST_ARGS='-k lora -x' is passed on"
	@echo "make check        lint, import contract, type check and tests: what CI runs"
	@echo "make lint         ruff: errors and formatting; make format repairs what can be repaired"
	@echo "make contract     the import directions of docs/architecture.md"
	@echo "make types        mypy over the public functions"
	@echo "make docs         the documentation as a site, in build/site; make docs-generated rewrites its tables"
	@echo "make lock         write requirements/*.txt anew from pyproject.toml"
	@echo "make pretrain     remake the embedded model from nothing"
	@echo "make clean        remove the environment and the caches; outputs/ stays"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter of a new environment (now: $(PYTHON)), VENV its folder ($(VENV))."

# ---- environment: a stamp is newer than what it was installed from, so nothing is installed twice -------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jaxft needs Python 3.11 or newer, and '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

# $(1): lock file, $(2): what to say
define install
	@echo "Installing $(2), pinned in $(1), into $(VENV) ..."
	@start=$$(date +%s); \
	  { $(pip) install --requirement $(1) && $(pip) install --no-deps --no-build-isolation --editable .; } || { \
	  echo "The installation failed. What an interrupted one has left can be the reason: rm -rf $(VENV) and try again."; \
	  exit 1; }; \
	  echo "Installed in $$(( $$(date +%s) - start )) s."
	@touch $@
endef

$(VENV)/.run: requirements/run.txt pyproject.toml | $(VENV)/.created
	$(call install,requirements/run.txt,jaxft and its dependencies (1.4 GB on disk; about a minute))

$(VENV)/.test: requirements/test.txt pyproject.toml | $(VENV)/.created
	$(call install,requirements/test.txt,jaxft and its test dependencies (2.4 GB on disk with torch; about two minutes))

# In a folder of its own, where only compilation ahead of time looks: beside jax, jax would try to start a TPU with it.
$(VENV)/.tpu: requirements/tpu.txt | $(VENV)/.created
	@echo "Installing the TPU compiler, pinned in $<, into $(VENV)/tpu (0.7 GB on disk) ..."
	@rm -rf $(VENV)/tpu
	@$(pip) install --no-deps --target $(VENV)/tpu --requirement $< || \
	  echo "There is none for this platform: the tests that compile for TPUs will be skipped."
	@touch $@

# The same for GPUs: jax's CUDA plugin without the rest of CUDA, which compiling does not need.
$(VENV)/.cuda: requirements/cuda.txt | $(VENV)/.created
	@echo "Installing the GPU compiler, pinned in $<, into $(VENV)/cuda (0.4 GB on disk) ..."
	@rm -rf $(VENV)/cuda
	@$(pip) install --no-deps --target $(VENV)/cuda --requirement $< || \
	  echo "There is none for this platform: the tests that compile for GPUs will be skipped."
	@touch $@

# ---- what it is for -------------------------------------------------------------------------------------------------

quickstart: $(VENV)/.run
	@$(VENV)/bin/jaxft compare configs/quickstart.yaml method=full,hft,lora
	@echo
	@echo "Three copies of the embedded model 'nano' (pretrained on Python's standard library documentation) have learned to"
	@echo "describe functions of numpy and jax from their signatures. The table says what each learned, and what it forgot."
	@echo
	@echo "Try next:"
	@echo "  $(VENV)/bin/jaxft compare configs/quickstart.yaml method=full,hft,lora,bitfit,lisa"
	@echo "  $(VENV)/bin/jaxft generate outputs/quickstart/hft --prompt 'numpy.linalg.norm(x, ord=None, axis=None)'"
	@echo "  $(VENV)/bin/jaxft data configs/quickstart.yaml       # the training text, with the trained tokens marked"
	@echo "  $(VENV)/bin/jaxft methods                            # every method, with its paper and options"
	@echo "  $(VENV)/bin/jaxft train --help                       # your own data: copy configs/quickstart.yaml"

# The tests of a file go to one worker: they share what is costly to make. Files in the order of tests/conftest.py.
test: $(VENV)/.test $(VENV)/.tpu $(VENV)/.cuda
	@$(python) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -q $(PYTEST_ARGS)

lint: $(VENV)/.test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(VENV)/.test
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

contract: $(VENV)/.test
	@$(VENV)/bin/lint-imports

types: $(VENV)/.test
	@$(VENV)/bin/mypy

check:
	@.ci/run

docs: $(VENV)/.run
	@$(pip) install --editable '.[docs]'
	@$(VENV)/bin/mkdocs build --strict --site-dir build/site

docs-generated: $(VENV)/.run
	@$(python) -m jaxft.config_docs

pretrain: $(VENV)/.run
	@$(python) -m jaxft.assets.build
	@$(VENV)/bin/jaxft train configs/pretrain-nano.yaml
	@$(VENV)/bin/jaxft export outputs/pretrain-nano outputs/nano --dtype bfloat16
	@echo "Remade in outputs/nano; copy its model.safetensors to jaxft/assets/nano to ship it."

# One universal resolution for every supported Python and platform, newest versions, by uv (in its own environment).
# torch's CUDA libraries are left out of the lock: pip takes them where it finds a CUDA build of torch, and not elsewhere.
UV := $(VENV)-lock/bin/uv pip compile --quiet --universal --upgrade --no-header --no-annotate --group build pyproject.toml
lock:
	@test -x $(VENV)-lock/bin/uv || { $(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip --quiet install uv; }
	@$(UV) > build.run.txt
	@$(UV) --extra test --constraint build.run.txt > build.test.txt
	@{ echo "# Written by 'make lock' from pyproject.toml: what a run needs."; cat build.run.txt; } > requirements/run.txt
	@{ echo "# Written by 'make lock' from pyproject.toml: what a run and the tests need."; \
	  grep -vE '^(nvidia-|cuda-|triton==)' build.test.txt; } > requirements/test.txt
	@$(UV) --extra tpu --constraint build.run.txt > build.tpu.txt
	@{ grep '^#' requirements/tpu.txt; grep '^libtpu==' build.tpu.txt; } > build.new.txt && mv build.new.txt requirements/tpu.txt
	@$(UV) --extra cuda --constraint build.run.txt > build.cuda.txt
	@{ grep '^#' requirements/cuda.txt; grep -E '^jax-cuda13-(plugin|pjrt)==' build.cuda.txt; } > build.new.txt && mv build.new.txt requirements/cuda.txt
	@rm build.run.txt build.test.txt build.tpu.txt build.cuda.txt
	@echo "requirements/run.txt: $$(grep -c == requirements/run.txt) pins, requirements/test.txt: $$(grep -c == requirements/test.txt)"

clean:
	rm -rf $(VENV) $(VENV)-lock .cache .hypothesis .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist *.egg-info
