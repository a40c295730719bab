# Each target installs what it needs into .venv, in the versions of requirements.lock: demo and ui without extras and tools.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
DOCS_VENV ?= .venv-docs
RUN := $(VENV)/bin/python
STORE ?= $(or $(firstword $(wildcard mlflow.db demo/mlflow.db)),mlflow.db)
INSTALLED := $(VENV)/.installed
RUNTIME := $(VENV)/.runtime
# Python compiles a module at its first import; compiling all 22,000 takes half of the installation. Where it may not write the
# result, each of the many processes of demo and test would compile torch, MONAI and MLflow again.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
STACK_BACKUP := STACK_UID=$$(id -u) STACK_GID=$$(id -g) docker compose --file docker/compose.yaml run --rm --build backup

.PHONY: help setup demo ui test test-slow docs lint types bench hard-use stack stack-check stack-test stack-backup stack-restore audit reference gallery release hooks lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

setup: $(INSTALLED)  ## install the locked packages into .venv

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --requirement requirements.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $(RUNTIME) $@

$(RUNTIME): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint requirements.lock hatchling editables
	$(PIP_INSTALL) --constraint requirements.lock --no-build-isolation --editable .
	touch $@

demo: $(RUNTIME)  ## 8 phantom patients, 2 folds, all stages with DVC, in demo/
	scripts/demo.sh $(abspath $(RUN))

ui: $(RUNTIME)  ## start the MLflow UI (STORE=FILE for another store)
	@# The address without a path opens MLflow's pages for language models.
	@echo "The server takes some seconds to start, and Ctrl-C stops it. Its runs:"
	@echo "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
	@# One worker, and no processes for jobs of language models: 0.4 GB of memory instead of 2.2 GB.
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		$(VENV)/bin/mlflow ui --workers 1 --backend-store-uri sqlite:///$(STORE)

test: setup  ## run the test suite, with every stage end to end
	$(RUN) -m pytest --numprocesses 2 --dist worksteal -m "not slow"

test-slow: setup  ## run the slow tests: kills, faults, Slurm, many processes
	$(RUN) -m pytest --numprocesses 2 --dist worksteal -m "slow and not alone"
	$(RUN) -m pytest -m "alone and not containers"

stack-test: setup  ## test the containers (needs Docker, or root on Debian)
	tests/stand_in/install.sh
	$(RUN) -m pytest tests/e2e/test_containers.py

lint: setup  ## check style and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup  ## check types
	$(RUN) -m mypy

docs: $(DOCS_VENV)/.installed  ## build the documentation site, build/site/index.html
	$(DOCS_VENV)/bin/sphinx-build -E -n -W --keep-going -q -c docs . build/site

$(DOCS_VENV)/.installed: docs/requirements.lock
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.lock
	touch $@

bench: setup  ## measure speed and memory as ratios, into bench.json
	$(RUN) scripts/benchmark.py --output bench.json

stack:  ## start the MLflow server in Docker (docs/server.md)
	$(PYTHON) scripts/stack_settings.py
	docker compose --file docker/compose.yaml up --build --detach --wait

stack-check: setup  ## check runs, artifacts, models and access on the server
	$(RUN) scripts/check_stack.py

stack-backup:  ## save the server's data to docker/backups/<time>
	mkdir -p docker/backups
	$(STACK_BACKUP) save /backups/$(or $(BACKUP),$(shell date -u +%Y%m%dT%H%M%SZ))

stack-restore:  ## restore a backup into an empty stack (BACKUP=NAME)
	$(STACK_BACKUP) restore /backups/$(or $(BACKUP),$(error name a folder of docker/backups: make stack-restore BACKUP=NAME))

audit:  ## look up known vulnerabilities of the locked packages
	$(PYTHON) scripts/audit.py

hard-use: setup  ## corrupted inputs, fuzzing, kill -9; about two hours
	$(RUN) -m scripts.hard_use.inputs --count 1000
	$(RUN) -m scripts.hard_use.inputs --count 1000 --stage predict
	FUZZ_EXAMPLES=200 $(RUN) -m pytest tests/test_config_fuzz.py
	HARD_USE=yes $(RUN) -m pytest -m "slow and not containers"
	$(RUN) -m scripts.hard_use.kills --kills 100
	$(RUN) -m scripts.hard_use.growth --sizes 500 1000 2000

reference: setup  ## write docs/reference.md from the settings classes
	$(RUN) scripts/update_reference.py

gallery: setup  ## draw the pages and pictures of the gallery
	$(RUN) -m scripts.gallery

release: setup  ## build wheel and sdist, and run the demo from the wheel
	scripts/release.sh $(abspath $(RUN))

hooks: setup  ## install a git hook that tags the runs of a commit
	scripts/install_hooks.sh $(abspath $(RUN))

lock: setup  ## write the installed versions to requirements.lock
	$(RUN) -m pip freeze --exclude-editable | sed -E 's/\+(cpu|cu[0-9]+)$$//' > requirements.lock

clean:  ## remove .venv, caches and demo/; data and models stay
	rm -rf $(VENV) $(DOCS_VENV) .pytest_cache .mypy_cache .ruff_cache build dist demo bench.json bench_gpu.json
