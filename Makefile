# make train [DATA=folder:PATH] [ARGS="--optim.steps 100 ..."]: install once, train the default on any machine.
# make test [TESTS="tests/test_model.py -k ..."]: install once, lint, run the tests, three processes for two cores, as
# some wait for others.
# make soak: faults of all kinds brought about in trainings, the table of docs/faults.md, and much fuzzing: under an hour.
# make test-instruction-sets: the numerical tests as other processors would compute.
# make bench: install once, measure operations, training step and data loading on the machine at hand.
# make gpu [STAGES="tests steps heads attention report"] [OUT=FOLDER]: on a machine with a GPU, with what PYTHON has
# installed, GPU tests, training steps and operations in at most 7 minutes; see benchmarks/gpu.py.
# make carried: pure packages that such a machine may lack, in .carried: PYTHONPATH=.carried make gpu.
# make collapse, make ablations, make schedules, make drawings [ARGS="--seeds 0 ..."]: the experiments of experiments/, a
# training a core; each some hours, and what is done is not repeated.
# make pictures: the pictures of docs/images, of an encoder that is trained for them; see docs/pictures.py.
PYTHON ?= python3
DATA ?= synthetic
ARGS ?=
VENV := .venv
# Files are worth loading in processes of their own; the scenes of the default lie in memory.
WORKERS := $(if $(filter-out synthetic,$(DATA)),$(shell nproc),0)
RUN := runs/tiny$(if $(filter-out synthetic,$(DATA)),-$(shell printf '%s' '$(DATA)' | tr -c 'A-Za-z0-9' '-'))

# Of benchmarks: the file that a part of them goes to.
PART ?=
empty :=
MACHINE = $$($(VENV)/bin/python -c 'from benchmarks.shapes import MACHINE; print(MACHINE)')
RAW = benchmarks/results/$(MACHINE)$(if $(PART),.$(subst $(empty) ,-,$(PART))).json
# Of make gpu: the stages, the folder of all that is written, how many GPU tests (or all), the steps, the seconds.
STAGES ?= tests steps heads attention report
OUT ?= benchmarks/results
GPU_TESTS ?= 90
STEPS ?=
GPU_SECONDS ?= 400
CARRIED := jsonargparse docstring_parser typeshed_client braceexpand xformers==0.0.35 nvidia-cuda-runtime-cu12

.PHONY: train test soak test-instruction-sets bench gpu carried seeds collapse ablations drawings schedules pictures clean

train: $(VENV)/.installed
	$(VENV)/bin/python -m capi.train --data.source '$(DATA)' --data.num_workers $(WORKERS) --run.output_dir '$(RUN)' $(ARGS)

# One thread a process, unless the environment says otherwise.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest -n $(shell nproc) --dist worksteal
TESTS ?= tests
# Trainings that are forked of a test's process come first, while it has no threads of other tests.
FORKING := tests/test_watchdog.py tests/test_stopping.py
NUMERICAL := $(wildcard $(patsubst %,tests/test_%.py,numerics reference sinkhorn clustering student_loss distributed_sinkhorn \
	     visible_attention masked_cross_attention cross_attention_weights model optim official_parity))

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(if $(filter tests,$(TESTS)),$(PYTEST) -n $(shell expr 2 "*" $(shell nproc)) $(FORKING))
	$(PYTEST) -n $(shell expr 3 "*" $(shell nproc) / 2) $(TESTS) $(if $(filter tests,$(TESTS)),$(addprefix --ignore=,$(FORKING)))

# Faults one after the other: they wait for each other's processes, and measure how long that takes.
soak: $(VENV)/.installed
	CAPI_SOAK=1 $(PYTEST) -n 0 tests/soak
	CAPI_FUZZ_TIMES=8 $(PYTEST) tests/test_fuzz_operations.py tests/test_fuzz_configurations.py

# A processor without the instructions keeps its own; MKL's COMPATIBLE is what it does on processors of other makers.
test-instruction-sets: $(VENV)/.installed
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(PYTEST) $(NUMERICAL)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(PYTEST) $(NUMERICAL)

# The report is written whatever failed; the status is that of the benchmarks.
bench: $(VENV)/.installed
	raw="$(RAW)"; status=0; \
	$(VENV)/bin/python -m pytest benchmarks --benchmark-only --benchmark-json "$$raw" $(if $(PART),-k '$(PART)') || status=$$?; \
	$(VENV)/bin/python -m benchmarks.report "$$raw" --readme && exit $$status

gpu:
	$(PYTHON) -m benchmarks.gpu --stages $(STAGES) --out '$(OUT)' --tests $(GPU_TESTS) --seconds $(GPU_SECONDS) \
	  $(if $(STEPS),--steps $(STEPS))

carried:
	$(PYTHON) -m pip install --quiet --no-deps --no-compile --upgrade --python-version 3.12 --only-binary=:all: \
	  --constraint constraints.txt --target .carried $(CARRIED)

# Three trainings of the default, and their evaluations as a results file.
seeds: $(VENV)/.installed
	for seed in 0 1 2; do $(VENV)/bin/python -m capi.train --run.seed $$seed --run.output_dir runs/tiny-seed-$$seed; done
	{ date -u '+Made by `make seeds` on %F, on a CPU.%n'; \
	  git log -1 --format='Commit %h.%n'; \
	  $(VENV)/bin/python -m capi.evaluate runs/tiny-seed-0 runs/tiny-seed-1 runs/tiny-seed-2; \
	} > benchmarks/results/tiny_seeds.md

collapse ablations drawings: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.$@ --jobs $(shell nproc) $(ARGS)

schedules: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.ablations --sweep schedules --jobs $(shell nproc) $(ARGS)

# The photographs come with packages of which nothing else is used.
pictures: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-compile --upgrade --only-binary=:all: \
	  --target .photographs scikit-image==0.26.0 scikit-learn==1.9.1
	$(VENV)/bin/python -m docs.pictures .photographs

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
