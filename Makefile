# make report · make test · make check · make lab: each sets up .venv by itself and touches nothing outside this folder.
PYTHON ?= python3
SIZE ?= quick
BIN := .venv/bin
export JUPYTER_CONFIG_DIR := $(CURDIR)/.venv/jupyter/config
export JUPYTER_DATA_DIR := $(CURDIR)/.venv/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CURDIR)/.venv/jupyter/runtime
export IPYTHONDIR := $(CURDIR)/.venv/ipython
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

# full is for a GPU; reports/ctbprn is what two CPU cores could do: STUDY=ctbprn TRIALS=40 REPLICAS=4 STEPS=500 SEEDS=8
ifeq ($(SIZE),quick)
STUDY ?= quick
TRIALS ?= 12
REPLICAS ?= 3
STEPS ?= 100
SEEDS ?= 4
AUDIT := -p n_seeds 40 -p n_fresh_seeds 4 -p n_spread_seeds 4 -p max_steps 20 -p n_curve_seeds 2
EXPLORE := -p n_steps 100
else ifeq ($(SIZE),full)
STUDY ?= flagship
TRIALS ?= 100
REPLICAS ?= 8
STEPS ?= 2000
SEEDS ?= 16
AUDIT := -p n_fresh_seeds 200 -p n_spread_seeds 32 -p max_steps 2000 -p n_curve_seeds 8
EXPLORE := -p n_steps 2000
else
$(error SIZE must be quick or full, got $(SIZE))
endif
REPRODUCE ?= $(if $(filter ctbprn,$(STUDY)),reproduce,$(STUDY)-reproduce)
RUN := $(BIN)/papermill --no-progress-bar --log-output

.PHONY: report reproduce explore tune confirm test check style lab
reproduce explore tune confirm: export TQDM_DISABLE := 1
report: reproduce explore tune confirm
	@$(MAKE) --no-print-directory reproduce  # once more, from what it has kept: the verdicts on the claims are there now
	@echo "Written: reports/$(STUDY)/report.html and reports/$(REPRODUCE)/report.html"

reproduce: .venv/ready
	$(RUN) notebooks/reproduce.ipynb runs/reproduce.ipynb -p study_name $(REPRODUCE) -p tested_by $(STUDY) $(AUDIT)
	$(BIN)/python -m ctbprn_lib.report.publish runs/reproduce.ipynb $(REPRODUCE)

explore: .venv/ready
	$(RUN) notebooks/explore.ipynb runs/explore.ipynb $(EXPLORE)

# tune and confirm end by running analyze.ipynb, which writes the report
tune: .venv/ready
	$(RUN) notebooks/tune.ipynb runs/tune.ipynb -p study_name $(STUDY) -p n_trials $(TRIALS) \
		-p n_replicas $(REPLICAS) -p n_steps $(STEPS)

confirm: tune
	$(RUN) notebooks/confirm.ipynb runs/confirm.ipynb -p study_name $(STUDY) -p n_seeds $(SEEDS)

# style, then types and tests side by side: all tests, or for use while editing those that are quick
TESTS := $(BIN)/mypy & $(BIN)/pytest --numprocesses logical --dist loadfile --no-loadscope-reorder
test: .venv/ready style
	$(TESTS); tests=$$?; wait $$! && exit $$tests

check: .venv/ready style
	$(TESTS) -m 'not slow'; tests=$$?; wait $$! && exit $$tests

style: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# (containers often have no user but root)
lab: .venv/ready
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed, got $$($(PYTHON) --version); name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[test,uea,postgres,dashboard]'
	@mkdir -p runs
	@touch $@
