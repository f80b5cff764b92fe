# `make demo` and `make test` are all a visitor needs; the rest is for those who change the code.
#
# TORCH picks the torch to install first (any that the project allows); plain `torch` may pull gigabytes of CUDA.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests benchmarks examples docs
NATIVE := CMakeLists.txt pyproject.toml $(wildcard csrc/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check gate soak sanitize bench format clean

demo: $(VENV)/.installed
	@$(BIN)/qkv demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

# The mutants live in a build of their own: the shipped kernels do not contain them.
gate: $(VENV)/.installed-dev $(VENV)/.mutants
	$(BIN)/python -m tests.gate
	$(BIN)/python -m tests.cache_model --operations 100000
	$(BIN)/python -m tests.cache_mutants
	PYTHONPATH=build/mutants $(BIN)/python -m tests.mutants

# A million operations, in two processes: some ten minutes.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.soak

bench: $(VENV)/.installed-dev
	$(BIN)/qkv bench

# The kernels under sanitizers, without Python: random calls, malformed masks, threads, forks. Building takes minutes.
SECONDS_EACH ?= 60
sanitize: sanitize-address sanitize-thread

sanitize-%: $(VENV)/.installed-dev
	$(BIN)/cmake -G Ninja -S tests/native -B build/sanitize/$* -DQKV_STRESS_SANITIZER=$* -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/cmake --build build/sanitize/$*
	build/sanitize/$*/stress --seconds $(SECONDS_EACH)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf build $(VENV)

$(VENV)/.torch:
	@echo "Setting up $(VENV) with $(TORCH) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(NATIVE)
	@echo "Compiling and installing qkv (a minute or two) ..."
	@$(BIN)/python -m pip install -q -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install -q -U "pip>=25.1"
	@$(BIN)/python -m pip install -q --group dev
	@touch $@

$(VENV)/.mutants: $(VENV)/.installed-dev
	@$(BIN)/cmake -G Ninja -S . -B build/mutants -DQKV_MUTANTS=ON -DQKV_REQUIRED=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja > /dev/null
	@$(BIN)/cmake --build build/mutants
	@touch $@
