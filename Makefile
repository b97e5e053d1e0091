# The README's commands. Everything happens in $(VENV); nothing is installed anywhere else.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
TARGET ?= coreml
EXTRAS ?= coreml,coreai,executorch,tensorrt-rtx,openvino,qnn,dev
OUTPUT ?= castling-out
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
OPTIONS ?=

.PHONY: export test test-slow witnesses lint models mutations bench scores install clean

export: install  ## the main job: the bundled network to TARGET
	$(VENV)/bin/castling-export --target $(TARGET) --output $(OUTPUT) --overwrite

test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q $(PARALLEL) $(OPTIONS)

test-slow: install  ## more of the same: combinations that `make test` leaves out
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q $(PARALLEL) -m slow $(OPTIONS)

witnesses: install  ## what pip cannot install for the witnesses, into the user's cache: about 200 MB
	$(VENV)/bin/castling setup arm64 web

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

models: install  ## count weights and multiply-accumulates again: bundled/models.json, docs/models.md
	$(VENV)/bin/python benchmarks/count_models.py

mutations: install  ## the gate's kill rate and its false alarms: benchmarks/results/mutations.csv, false_alarms.csv
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/mutations.py
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python benchmarks/false_alarms.py

bench: install  ## how fast the artefacts are, and the tool: benchmarks/results/speed.*; a quarter of an hour
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/speed.py

scores: install  ## the bundled networks on every target in every precision: benchmarks/results/scores.csv; 30 minutes
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/scores.py

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing torch and the toolchains into $(VENV): one to ten minutes, by the network"
	$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) $(OUTPUT) build dist *.egg-info
