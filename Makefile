# `make demo` and `make test` need nothing before them but a Python of 3.11 or newer: each sets up .venv for itself.
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
# Compared with PyTorch, or with recordings of its mels, as users compile; the endpoint under load too. The other tests
# compile quickly.
NUMBERS := tests/parity tests/test_audio.py
test: QUICK = XLA_FLAGS="$(XLA_FLAGS) $$($(BIN)/python tests/xla_flags.py)"
test: PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Tests, and processes that they start, need the same programs: each is compiled once.
test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.venv/compiled
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1

# `make fuzz` tries as many damaged checkpoints.
FUZZ_INPUTS ?= 1000000

.PHONY: demo test test-matrix gates soak fuzz check format docs clean

demo: .venv/core
	PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/demo.sh demo-out

test: check
	$(BIN)/python -m pytest -m "not slow and not alone and not tpu" $(PARALLEL) $(NUMBERS)
	$(QUICK) $(BIN)/python -m pytest -m "not slow and not alone and not tpu" $(PARALLEL) \
		tests $(addprefix --ignore ,$(NUMBERS))
	$(QUICK) $(BIN)/python -m pytest -m alone tests/train
	$(BIN)/python -m pytest -m alone tests/serving
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 $(BIN)/python -m pytest -m "tpu and not slow" --numprocesses 2 --dist worksteal

# Each Python with the oldest and the newest packages that pyproject.toml allows, 25 minutes on two cores.
test-matrix: .venv/uv
	$(BIN)/python tests/matrix.py

# The released sizes, compiled for TPUs: all of them take an hour or two.
gates: .venv/test
	$(BIN)/python -m pytest -m tpu -v tests/train/test_gates.py

# Runs under kills and faults, about an hour: docs/soak.md.
soak: .venv/test
	PYTHONPATH=. $(BIN)/python tests/soak.py

# Damaged checkpoints, a million by default, 20 minutes on two cores: docs/robustness.md.
fuzz: .venv/test
	PYTHONPATH=. $(BIN)/python -m tests.fuzz.run --inputs $(FUZZ_INPUTS)

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ and the API reference, into site/; a broken link is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-matrix demo-out site

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/core: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plot]'
	touch $@

.venv/test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

.venv/uv: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.13'
	touch $@

.venv/docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@
