# make video   the main job: a real video through the demo model on 4 ranks, verified
# make test    all tests
# make setup   what both need; a second call starts in seconds
# make lint    ruff

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NPROC ?= 4
CLIP ?= clip:bigbuckbunny
FRAMES ?= 32
OUT ?= runs/demo
# Processes that share the test files; each keeps a pool of eight ranks.
JOBS ?= 2

.PHONY: setup test video lint clean

setup: $(STAMP)

$(STAMP): constraints.txt demo-assets.txt setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[video,hf,megatron,ray,mpi,bench,demo,dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --requirement demo-assets.txt
	$(BIN)/python -m launch.assets
	touch $(STAMP)

test: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

video: setup
	$(BIN)/tokenring run $(CLIP) --frames $(FRAMES) --nproc $(NPROC) --schedule tokenring --verify --out $(OUT) --overwrite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info
