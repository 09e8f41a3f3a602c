# Everything happens in .venv; nothing else on the machine is touched. All targets may be repeated.
PYTHON ?= python3
BIN := .venv/bin
PACKAGING := pyproject.toml setup.py constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install demo test lint soak

install: .venv/.installed-dev

demo: .venv/.installed-demo
	$(BIN)/vlm demo --out runs/demo

test: .venv/.installed-dev
	$(BIN)/pytest -q -n auto --maxprocesses 4

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

soak: .venv/.installed-dev
	$(BIN)/pytest -q -m "" --timeout 3600

# pip is what venv writes last, so a half-made environment is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.installed-demo: $(PACKAGING) | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e '.[train,serve,eval]'
	touch $@

.venv/.installed-dev: $(PACKAGING) | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e '.[train,serve,eval,quant,sentencepiece,dev]'
	touch $@ .venv/.installed-demo
