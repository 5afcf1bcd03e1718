# make train [DATA=folder:PATH] [ARGS="--optim.steps 100 ..."]: install once, train the default on any machine.
# make test: install once, lint, run the tests.
PYTHON ?= python3
DATA ?= synthetic
ARGS ?=
VENV := .venv
RUN := runs/tiny$(if $(filter-out synthetic,$(DATA)),-$(shell printf '%s' '$(DATA)' | tr -c 'A-Za-z0-9' '-'))

.PHONY: train test clean

train: $(VENV)/.installed
	$(VENV)/bin/python -m capi.train --data.source '$(DATA)' --run.output_dir '$(RUN)' $(ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
