PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

# One file says that .venv matches the pins, so that running a target again installs nothing.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[train,test,onnx]'
	touch $@

.PHONY: install demo test test-all soak lint
install: .venv/.installed

demo: install
	$(BIN)/referral demo --run runs/demo

test: install
	$(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pytest -m ''

# Long repetitions of the fault tests; a few of each kind are in `make test`.
soak: install
	$(BIN)/python tests/trainer/data/corrupt_sets.py 1000
	$(BIN)/python tests/trainer/data/once.py
	$(BIN)/python tests/trainer/data/killed.py 20
	$(BIN)/python tests/trainer/data/faulty_store.py 50
	$(BIN)/python tests/trainer/engines/killed.py 30
	$(BIN)/python tests/trust/clearing.py 36
	$(BIN)/python tests/trust/power.py 24
	$(BIN)/python tests/trust/bits.py 200
	$(BIN)/python tests/trust/disks.py 32

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
