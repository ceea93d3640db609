# make report · make test · make lab: each sets up .venv by itself and touches nothing outside this folder.
PYTHON ?= python3
SIZE ?= quick
BIN := .venv/bin
export JUPYTER_CONFIG_DIR := $(CURDIR)/.venv/jupyter/config
export JUPYTER_DATA_DIR := $(CURDIR)/.venv/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CURDIR)/.venv/jupyter/runtime
export IPYTHONDIR := $(CURDIR)/.venv/ipython
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

ifeq ($(SIZE),quick)
STUDY := quick
TUNE := -p n_trials 12 -p n_replicas 3 -p n_steps 200
else ifeq ($(SIZE),full)
STUDY := ctbprn
TUNE := -p n_trials 40 -p n_replicas 4 -p n_steps 600
else
$(error SIZE must be quick or full, got $(SIZE))
endif

.PHONY: report test lab
report: .venv/ready | runs
	$(BIN)/papermill --no-progress-bar --log-output notebooks/explore.ipynb runs/explore.ipynb
	$(BIN)/papermill --no-progress-bar --log-output notebooks/tune.ipynb runs/tune.ipynb -p study_name $(STUDY) $(TUNE)
	@echo "The report is reports/$(STUDY)/report.html"

test: .venv/ready
	$(BIN)/ruff check ctbprn_lib notebooks tests
	$(BIN)/ruff format --check ctbprn_lib notebooks tests
	$(BIN)/pytest

lab: .venv/ready
	$(BIN)/jupyter lab --notebook-dir=. notebooks

runs:
	mkdir -p runs

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11 to 3.13 is needed, got $$($(PYTHON) --version); name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,uea,postgres,dashboard]'
	@touch $@
