# One command each; every one sets up what it needs, once, into .venv and nowhere else.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Kernels of this environment come before any that the user has registered under the same name.
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help study test lab bench refresh clean

help:
	@echo "make study    run the numbered notebooks on the demo profile (results: data/runs/demo)"
	@echo "make test     run the whole test suite"
	@echo "make lab      open the notebooks in JupyterLab"
	@echo "make bench    time the merge engine beside mergekit, and the measures"
	@echo "make refresh  maintainers: rerun from nothing and rewrite notebooks, figures and results"
	@echo "make clean    remove .venv and data/runs"
	@echo "Python 3.11 to 3.14 is taken from PATH as python3; another: make study PYTHON=python3.13"

# The stamp is written last: an interrupted set-up is taken up again by the next call.
$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on the PATH: install Python 3.11 to 3.14, or name one: make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -I helpers/supported.py
	@echo "Setting up .venv (once; torch is the largest download, up to 3 GB where it comes with CUDA)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -r requirements.txt -e .
	@touch $@

study: $(READY)
	@$(BIN)/python -m helpers run demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env -x notebooks/04_bound.ipynb notebooks/05_statistics.ipynb

lab: $(READY)
	$(BIN)/jupyter lab $(LAB) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

bench: $(READY)
	$(BIN)/python tests/benchmarks/bench_merge.py
	$(BIN)/python tests/benchmarks/bench_measures.py

refresh: $(READY)
	@$(BIN)/python -m helpers refresh demo

clean:
	rm -rf .venv data/runs
