# Every target does everything it needs from a bare machine with Python 3.11 or newer; the commands are shown as they run.
# More arguments for a run:  make quickstart ARGS="output_dir=runs/first seed=1"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ARGS ?=

.PHONY: venv quickstart smoke test test-slow lint

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

quickstart: venv
	$(BIN)/python -m sdtrain +experiment=quickstart $(ARGS)

smoke: venv
	$(BIN)/python -m sdtrain +experiment=smoke $(ARGS)

test: venv
	$(BIN)/python -m pytest -m "not gpu and not slow and not slurm" $(ARGS)

test-slow: venv
	$(BIN)/python -m pytest -m "not gpu and (slow or slurm)" $(ARGS)

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
