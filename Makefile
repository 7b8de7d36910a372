# `make demo` runs the main job on the shipped checkpoint; `make test` runs lint, types and all tests.
# `make bench` and `make bench-gpu` measure what docs/benchmarks.md says of speed and memory, on a quiet machine, and rewrite it.
# `make against` tries verify --against on healthy random models and on planted faults (half an hour).
# `make mutants` plants faults and fails if tests do not notice one; FAULTS='--file PATH' and other options choose some.
# They make their environment first: .venv, with the tested versions of constraints.txt; `make bench-gpu` takes PYTHON
# where there is no .venv, and also runs the tests marked cuda and writes benchmarks/gpu/.

PYTHON ?= python3
BIN := .venv/bin
OUT := out/shakespeare-onnx

# A GPU host may have no network: its own Python will do, where it has the packages.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: demo test lint mutants kills against fuzz bench bench-gpu clean

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

test: lint out/onnxruntime-1.32
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

mutants: .venv/.installed
	$(BIN)/python -m tests.trials.mutants $(FAULTS)

# Commands that write, killed at random moments and on full disks.
against: .venv/.installed
	$(BIN)/python -m tests.trials.against --count 200 --conformance
	$(BIN)/python -m tests.trials.against --count 8 --seed 500 --faults

kills: .venv/.installed
	$(BIN)/python -m tests.trials.kills --kills 200 --disks 40

# Readers of strangers' files, for half an hour; `--target`, `--seed` and `--minutes` are options of FUZZ.
fuzz: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test,fuzz]'
	$(BIN)/python -m tests.trials.fuzz --minutes 30 --seed 1 $(FUZZ)

# The official decoder is an alternative too; it comes without what it depends on.
out/torchscale: .venv/.installed
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target $@ torchscale==0.3.0

# llama.cpp is one as well. It is compiled for this machine, a quarter of an hour, so only where it is asked for. GCC 12
# drops stores to the tile configuration of its AMX code (ggml-org/llama.cpp#26954), which ends in illegal instructions.
out/llama-cpp:
	$(PYTHON) -m venv $@
	CXXFLAGS='-fno-tree-dse -fno-dse' $@/bin/pip install --disable-pip-version-check --quiet \
		llama-cpp-python==0.3.36 gguf==0.19.0 || { rm -rf $@; exit 1; }

# The first onnxruntime that runs opset 27, for its tests; onnxruntime-gpu of that version is still to come.
out/onnxruntime-1.32: | .venv/.installed
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target $@ onnxruntime==1.32.0

# The parts behind record.py share exports, which another commit may have written.
bench: .venv/.installed out/torchscale
	rm -rf out/bench && mkdir -p out/bench
	$(BIN)/python benchmarks/record.py --device cpu --folder out/bench
	$(BIN)/python benchmarks/opening.py --folder out/bench --exports out/bench
	$(BIN)/python benchmarks/torchscale_step.py --torchscale out/torchscale --exports out/bench \
		-o benchmarks/torchscale_step.json
	@if [ -d out/llama-cpp ]; then \
		$(BIN)/python benchmarks/llama_cpp.py --llama-python out/llama-cpp/bin/python --folder out/bench; \
	else echo "llama.cpp is not measured: it is not in out/llama-cpp (make out/llama-cpp)"; fi
	rm -rf out/bench
	$(BIN)/python benchmarks/docs_tables.py

# What fails stops nothing behind it, and is the exit code in the end.
bench-gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
bench-gpu:
	@status=0; \
	for part in gpu.py 'record.py --device cuda' docs_tables.py; do \
		echo "benchmarks/$$part"; $(GPU_PYTHON) benchmarks/$$part || status=1; \
	done; exit $$status

clean:
	rm -rf .venv out
