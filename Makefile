PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

# yes: every file that is installed has a sha256 of requirements/*.lock.  no: the releases of
# constraints.txt from whatever index pip uses, for wheels of torch that these files do not list.
# Of torch the wheel for CPUs is taken where pip's own settings have it, else PyPI's.
HASHES ?= yes
PIP = $(BIN)/pip --quiet --disable-pip-version-check
LOCKED = $(PIP) install --require-hashes --no-deps --no-build-isolation

# One file says that .venv matches the pins, so that running a target again installs nothing.
.venv/.installed: pyproject.toml constraints.txt $(wildcard requirements/*.lock)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(HASHES),yes)
	$(LOCKED) -r requirements/build.lock
	$(LOCKED) -r requirements/base.lock
	$(LOCKED) -r requirements/torch-cpu.lock 2>/dev/null || $(LOCKED) -r requirements/torch.lock
	! grep -q 'Requires-Dist: nvidia' $(BIN)/../lib/python3*/site-packages/torch-*/METADATA \
		|| $(LOCKED) -r requirements/cuda.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	$(PIP) check
else
	$(PIP) install -c constraints.txt torch -e '.[train,deepspeed,onnx,test]'
endif
	touch $@

.PHONY: install demo test test-all test-matrix gpu soak lint dist docs readability
install: .venv/.installed

demo: install
	$(BIN)/referral demo --run runs/demo

# Two files of tests side by side; those on Slurm share one cluster, and run after the others.
SIDE_BY_SIDE := -n 2 --dist loadfile

test: install
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: install
	$(BIN)/python -m pytest -m 'not slurm' $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m slurm

# On a machine with a GPU: the tests marked gpu and samples per second, as one table, in minutes.
gpu: install
	$(BIN)/python -P -m benchmarks.gpu

# The wheel in clean environments of the lowest and the newest versions; gigabytes and minutes a row.
# MATRIX="3.13:lowest" asks for one row; without it, the Pythons that are at hand.
test-matrix: dist
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/python tests/matrix.py dist/*.whl $(MATRIX)

dist: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# Long repetitions of the fault tests; a few of each kind are in `make test`.  Of each program a piece
# can be run by itself: PROGRAM COUNT --first NUMBER --seed SEED.
soak: install
	$(BIN)/python tests/trainer/data/corrupt_sets.py 1000
	$(BIN)/python tests/trainer/data/once.py
	$(BIN)/python tests/trainer/data/killed.py 20
	$(BIN)/python tests/trainer/data/faulty_store.py 50
	$(BIN)/python tests/trainer/engines/killed.py 30
	$(BIN)/python tests/ensemble/hostile_problems.py 10000
	$(BIN)/python tests/trainer/data/hostile_tars.py 60
	$(BIN)/python tests/ensemble/mutated_bundles.py 1200
	$(BIN)/python tests/launch/mutated_runs.py 400
	$(BIN)/python tests/trust/clearing.py 36
	$(BIN)/python tests/trust/power.py 24
	$(BIN)/python tests/trust/bits.py 200
	$(BIN)/python tests/trust/disks.py 32
	$(BIN)/python tests/trust/older.py 200
	$(BIN)/python tests/trust/twins.py 30
	$(BIN)/python tests/trust/strange_runs.py 300
	$(BIN)/python tests/trust/full_outputs.py 40

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

# The site, to build/site: without the network once its packages are there.  Broken links fail.
.venv/.docs: .venv/.installed
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -P -m mkdocs build --strict
	@echo 'build/site is written; to read it: python -m http.server --directory build/site'

# How long the sentences of docs, docstrings and comments are; a test holds the same bars.
readability: install
	$(BIN)/python tests/readability.py --sentences 5
