# Each target sets up what it needs in .venv; interrupted or repeated, it goes on where it can.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # two files at a time, in the order of their names
export HF_HUB_DISABLE_TELEMETRY := 1
.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz docs lab prepare gates
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# The stamp is written last: an interrupted installation is taken up again. torch comes first and exactly pinned,
# so that a CPU build that is already there or configured is taken rather than gigabytes of CUDA packages.
.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: .venv/.installed  ## the whole job, small and real: about 3 minutes on two cores
	$(BIN)/medmcqa-lora demo

test: .venv/.installed  ## the tests, slow ones sampled
	$(PYTEST)

test-all: .venv/.installed  ## the tests with every repetition
	MEDMCQA_TEST_ALL=1 $(PYTEST)

FUZZ_SECONDS ?= 600
fuzz: .venv/.installed  ## fuzzing of the row and recipe loaders, FUZZ_SECONDS each; what it finds goes to _runs/fuzz
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	$(BIN)/python tests/security/fuzz/run.py $(FUZZ_SECONDS)

lab: .venv/.installed  ## JupyterLab on the notebooks
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter lab nbs  # tqdm's bars are text here; its advice would stand in every notebook

docs: .venv/.installed  ## the site, in _docs/: Quarto where it is installed, else a preview
	$(BIN)/python tools/build_docs.py

gates: .venv/.installed  ## export in sync, notebooks clean, README current, lint, sizes
	$(BIN)/python tools/gates.py

prepare: .venv/.installed  ## before a commit: export, clean, README, tests
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/make_readme.py
	$(MAKE) test
