# `make demo` runs the main job on the shipped checkpoint; `make test` runs lint, types and all tests.
# Both make their environment first: .venv, with the tested versions of constraints.txt.
# `make bench-gpu` runs all that needs a GPU, with .venv or PYTHON as it is, and writes benchmarks/gpu/.

PYTHON ?= python3
BIN := .venv/bin
OUT := out/shakespeare-onnx

# A GPU host may have no network: its own Python will do, where it has the packages.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: demo test lint bench-gpu clean

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/.installed
	$(BIN)/retnet-tools verify fixtures/shakespeare --modes parallel,recurrent,chunkwise
	$(BIN)/retnet-tools export fixtures/shakespeare --to onnx -o $(OUT) --force
	$(BIN)/retnet-tools generate $(OUT) -p 'To be, or not to be' -n 80

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

bench-gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) benchmarks/gpu.py

clean:
	rm -rf .venv out
