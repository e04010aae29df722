# make train: set everything up and train on the embedded demo.   make test: set everything up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Left to guess, the launcher warns that it found no GPU.
ifeq ($(wildcard /dev/nvidiactl),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: train test test-slow test-faults test-launcher test-slurm test-network test-catalogue test-recipes lint types clean

train: $(VENV)/ready
	$(BIN)/deepspeed -q launch/train.py --ds_config ds_configs/zero2.json

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

# The next four kill runs, and need more of a machine than the tests above: SLURM and network namespaces need root.
test-faults: $(VENV)/ready
	$(BIN)/python -m pytest -s tests/machines/faults.py
	$(BIN)/python -m pytest tests/test_faults.py tests/test_stopping.py

test-launcher: $(VENV)/ready
	$(BIN)/python -m pytest -s tests/machines/launcher.py

test-slurm: $(VENV)/ready
	$(BIN)/python -m pytest tests/machines/slurm.py

test-network: $(VENV)/ready
	$(BIN)/python -m pytest tests/machines/network.py

test-catalogue: $(VENV)/ready
	$(BIN)/python tests/machines/catalogue.py

# Every method by its demo recipe, from beginning to end.
test-recipes: $(VENV)/ready
	$(BIN)/python tests/machines/recipes.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=python3.11, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs
