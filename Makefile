# One command each; every one sets up what it needs, once, into .venv and nowhere else.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CLASS := .venv-class/bin
CLASS_READY := .venv-class/.ready
COPIES := data/runs/class
# The notebooks that need no model: the tests execute them again.
LIGHT := $(wildcard $(addprefix notebooks/,00_*.ipynb 04_*.ipynb 05_*.ipynb 05a_*.ipynb 08_*.ipynb))
# Kernels of this environment come before any that the user has registered under the same name.
export JUPYTER_PREFER_ENV_PATH := 1
# Threads that spin while they wait make a shared machine ten times slower; yours is left as it is.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

.DEFAULT_GOAL := help
.PHONY: help study test lab class size bench refresh clean

help:
	@echo "make study    run the numbered notebooks on the demo profile (results: data/runs/demo)"
	@echo "make test     run the whole test suite"
	@echo "make lab      open the notebooks in JupyterLab"
	@echo "make class    open copies with the exercises left to do, without torch (00, 04, 05, 08)"
	@echo "make size     lines, and tokens a line, of every file and notebook"
	@echo "make bench    time the merge engine beside mergekit, the measures, a slice of the study"
	@echo "make refresh  maintainers: rerun from nothing and rewrite notebooks, figures and results"
	@echo "make clean    remove .venv and data/runs"
	@echo "Python 3.11 to 3.14 is taken from PATH as python3; another: make study PYTHON=python3.13"

define CHECK_PYTHON
@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on the PATH: install Python 3.11 to 3.14, or name one: make PYTHON=python3.13" >&2; exit 1; }
@$(PYTHON) -I helpers/supported.py
endef

# The stamp is written last: an interrupted set-up is taken up again by the next call.
$(READY): requirements.txt pyproject.toml
	$(CHECK_PYTHON)
	@echo "Setting up .venv (once; torch is the largest download, up to 3 GB where it comes with CUDA)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -r requirements.txt -e .
	@touch $@

# For a class: what only reads tables, a tenth of the download.
$(CLASS_READY): requirements.txt pyproject.toml
	$(CHECK_PYTHON)
	@$(CLASS)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-class
	$(CLASS)/python -m pip install -c requirements.txt -e '.[class]'
	@touch $@

study: $(READY)
	@$(BIN)/python -m helpers run demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env tests $(LIGHT)

lab: $(READY)
	$(BIN)/jupyter lab $(LAB) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

class: $(CLASS_READY)
	@$(CLASS)/python -m helpers students $(COPIES)
	$(CLASS)/jupyter lab $(LAB) --LabApp.default_url=/lab/tree/$(COPIES)/00_start_here.ipynb

size: $(READY)
	@$(BIN)/python tests/size.py helpers notebooks

bench: $(READY)
	$(BIN)/python tests/benchmarks/bench_merge.py
	$(BIN)/python tests/benchmarks/bench_measures.py
	$(BIN)/python tests/benchmarks/bench_time.py

refresh: $(READY)
	@$(BIN)/python -m helpers refresh demo

clean:
	rm -rf .venv .venv-class data/runs
