PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

# One file says that .venv matches the pins, so that running a target again installs nothing.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[train,deepspeed,onnx,test]'
	touch $@

.PHONY: install demo test test-all test-matrix soak lint dist
install: .venv/.installed

demo: install
	$(BIN)/referral demo --run runs/demo

test: install
	$(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pytest -m ''

# The wheel in clean environments of the lowest and the newest versions; gigabytes and minutes a row.
# MATRIX="3.13:lowest" asks for one row; without it, the Pythons that are at hand.
test-matrix: dist
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/python tests/matrix.py dist/*.whl $(MATRIX)

dist: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# Long repetitions of the fault tests; a few of each kind are in `make test`.
soak: install
	$(BIN)/python tests/trainer/data/corrupt_sets.py 1000
	$(BIN)/python tests/trainer/data/once.py
	$(BIN)/python tests/trainer/data/killed.py 20
	$(BIN)/python tests/trainer/data/faulty_store.py 50
	$(BIN)/python tests/trainer/engines/killed.py 30

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
