# `make demo` and `make test` need nothing but Python 3.10+ and pip; they set up .venv themselves.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
export PYTHONUNBUFFERED := 1

.PHONY: setup demo pretrain test test-slow lint soak bench gpu schema jobs docs docs-serve docs-setup clean

setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed -c env_setup/constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(RUN) demo.py

pretrain: setup
	$(RUN) pretrain.py

# One thread a process, WORKERS processes; each needs 1.5 GB of memory. The tests of a file stay together, with what they share.
WORKERS ?= 2
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile

test-slow: setup
	$(RUN) -m pytest -m slow

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m mypy OpenSciDraw train_OpenSciDraw_loop.py train_OpenSciDraw_fulltune.py demo.py pretrain.py benchmarks jobs

soak: setup
	$(RUN) benchmarks/run_soak.py --kills $(or $(N),100)

bench: setup
	$(RUN) benchmarks/run_all.py

# On a machine with an NVIDIA card and no network: its own Python, with the torch that is there, and no .venv.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) benchmarks/gpu/suite.py $(if $(PART),--part $(PART)) $(if $(RESULTS),--results $(RESULTS))

schema: setup
	$(RUN) docs/update_config_table.py

jobs: setup
	$(RUN) jobs/generate.py

# The pages of docs/ as a website in site/: links and the list of pages are checked, and a warning is an error.
docs: docs-setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

docs-serve: docs-setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

docs-setup: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed -c env_setup/constraints.txt -e '.[docs]'

clean:
	rm -rf $(VENV) runs data site
