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
REPRODUCE := quick-reproduce
TUNE := -p n_trials 12 -p n_replicas 3 -p n_steps 250
AUDIT := -p n_seeds 40 -p n_fresh_seeds 4 -p n_spread_seeds 4 -p max_steps 20 -p n_curve_seeds 2
else ifeq ($(SIZE),full)
STUDY := ctbprn
REPRODUCE := reproduce
TUNE := -p n_trials 40 -p n_replicas 4 -p n_steps 500
AUDIT := -p n_fresh_seeds 200 -p n_spread_seeds 32 -p max_steps 2000 -p n_curve_seeds 8
else
$(error SIZE must be quick or full, got $(SIZE))
endif
RUN := $(BIN)/papermill --no-progress-bar --log-output

# Two jobs that need nothing of each other: `OMP_NUM_THREADS=1 make -j2 report` runs one on each core.
.PHONY: report reproduce study test lab
reproduce study: export TQDM_DISABLE := 1
report: reproduce study
	@echo "Written: reports/$(STUDY)/report.html and reports/$(REPRODUCE)/report.html"

reproduce: .venv/ready
	$(RUN) notebooks/reproduce.ipynb runs/reproduce.ipynb -p study_name $(REPRODUCE) $(AUDIT)
	$(BIN)/python -m ctbprn_lib.publish runs/reproduce.ipynb $(REPRODUCE)

study: .venv/ready
	$(RUN) notebooks/tune.ipynb runs/tune.ipynb -p study_name $(STUDY) $(TUNE)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

# (containers often have no user but root)
lab: .venv/ready
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11 to 3.13 is needed, got $$($(PYTHON) --version); name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[test,uea,postgres,dashboard]'
	@mkdir -p runs
	@touch $@
