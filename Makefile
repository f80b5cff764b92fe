# `make demo` and `make test` are all a visitor needs; the rest is for those who change the code.
#
# What is installed has the versions of requirements.lock, on the Python that it was made with. TORCH picks another torch
# (any that the project allows); it comes first, since a plain `torch` may pull gigabytes of CUDA.
LOCK := requirements.lock
TORCH ?= $(shell grep '^torch==' $(LOCK))
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt
CONSTRAIN := $(BIN)/python tools/lock.py constraints "$(TORCH)" > $(VENV)/constraints.txt
CODE := src tests benchmarks examples docs tools
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp tests/native/*.h tests/native/*.cpp)
NATIVE := CMakeLists.txt pyproject.toml $(wildcard cmake/* csrc/* csrc/*/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test quick check gate gpu-test soak sanitize test-arm test-page bench models foreign format lock compatibility clean

demo: $(VENV)/.installed
	@$(BIN)/qkv demo

# make test T=tests/masks runs a part of them.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 $(T)

# What a change breaks first, in under a minute: cases against the oracle, masks, plans, errors, and the documentation.
QUICK := tests/house/test_gate.py::test_named_cases tests/house/test_docs.py tests/house/test_docstrings.py \
	tests/house/test_shapes.py tests/house/test_readme.py tests/masks/test_algebra.py tests/masks/test_values.py \
	tests/masks/test_errors.py tests/masks/test_programs.py tests/masks/test_scores.py tests/malformed \
	tests/attention/test_oracle.py tests/attention/test_plan.py tests/attention/test_errors.py \
	tests/attention/test_positions.py tests/gradients/test_against_the_oracle.py tests/views/test_errors.py
quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 $(QUICK)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

# The mutants live in a build of their own: the shipped kernels do not contain them. Their mistakes are in what all
# instruction sets share, so two are enough to die on: the best of this machine, and the one that every machine has.
gate: $(VENV)/.installed-dev $(VENV)/.mutants
	$(BIN)/python -m tests.gates.gate
	$(BIN)/python -m tests.gates.cache_model --operations 100000
	$(BIN)/python -m tests.gates.cache_mutants
	PYTHONPATH=build/mutants $(BIN)/python -m tests.gates.mutants

# On a GPU: calls on every backend that takes its tensors and the rest of the library, some six minutes. ARGS="--device
# cpu" asks the same of a CPU.
gpu-test: $(VENV)/.installed-dev
	$(BIN)/python -m tests.gates.gpu $(ARGS)

# A million operations, in two processes: some ten minutes.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.gates.soak

bench: $(VENV)/.installed-dev
	$(BIN)/qkv bench

# Every model type of the installed transformers, small, `eager` against `qkv`: an hour, and goes on where it was stopped.
# What it found is kept in build/models; ARGS="--retry" tries again what was not built, ARGS="llama t5" those types only.
models: $(VENV)/.installed-dev
	$(BIN)/python -W ignore -m tests.gates.hf_sweep $(ARGS)

# PyTorch's own tests on qkv, from the folder that holds its files (docs/foreign_tests.md).
EVERY ?= 1
foreign: $(VENV)/.installed-dev
	@test -n "$(DIR)" || { echo "make foreign DIR=...: the folder that holds PyTorch's test files (docs/foreign_tests.md)"; exit 2; }
	$(BIN)/python -m tests.gates.foreign --every $(EVERY) "$(DIR)"

# The kernels under sanitizers, without Python: random calls, malformed masks, threads, forks. Building takes minutes.
SECONDS_EACH ?= 60
sanitize: sanitize-address sanitize-thread

sanitize-%: $(VENV)/.installed-dev
	$(BIN)/cmake -G Ninja -S tests/native -B build/sanitize/$* -DQKV_STRESS_SANITIZER=$* -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/sanitize/$*
	build/sanitize/$*/stress --seconds $(SECONDS_EACH)

# The kernels for ARM, by a cross compiler and an emulator: what is missing is named, and installed where root may. Minutes.
test-arm: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.gates.arm $(ARGS)

# The page of a trace in Chromium, which is installed where root may; pictures of it in build/page. A minute.
test-page: $(VENV)/.installed-dev
	$(BIN)/python -m tests.gates.page

format: $(VENV)/.installed-dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/python tools/layers.py

# The newest of everything in the lock, but the torch that it names: `make lock TORCH=torch==...` takes another.
lock:
	$(PYTHON) tools/lock.py make "$(TORCH)"

# The tests on the oldest and the newest torch and transformers, in throw-away environments of gigabytes. Never in CI.
compatibility: $(VENV)/.installed
	$(BIN)/python tools/compatibility.py $(if $(ONLY),--only $(ONLY)) $(if $(TESTS),--tests $(TESTS))

clean:
	rm -rf build $(VENV)

$(VENV)/.torch: $(LOCK)
	@echo "Setting up $(VENV) with $(TORCH) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(CONSTRAIN)
	@$(PIP) "pip>=25.1"
	@$(PIP) "$(TORCH)"
	@$(CONSTRAIN) 2> /dev/null
	@touch $@

# Without build isolation the tools that build are the locked ones, too.
$(VENV)/.installed: $(VENV)/.torch $(NATIVE)
	@echo "Compiling and installing qkv (a minute or two) ..."
	@$(PIP) --group build
	@$(PIP) --no-build-isolation -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --group dev
	@touch $@

$(VENV)/.mutants: $(VENV)/.installed-dev
	@$(BIN)/cmake -G Ninja -S . -B build/mutants -DQKV_MUTANTS=ON \
		-DQKV_ONLY="$$($(BIN)/python -m tests.kit.backends)" \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja > /dev/null
	@$(BIN)/cmake --build build/mutants
	@touch $@
