# OmniServe: one command each. Every target sets up .venv when it has to, and only then.
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Processes that share the tests out. Each loads models of its own.
TEST_PROCESSES ?= 2
SOAK_SECONDS ?= 600
KILLS ?= 200
SERVER_KILLS ?= 40
KILL_SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/.stamp-tools
DEPS := $(VENV)/.stamp-deps
PLOTS := $(VENV)/.stamp-plots
BROWSER := $(VENV)/.stamp-browser
INSTALLED := $(VENV)/.stamp-installed
NATIVE := CMakeLists.txt $(shell find src/omniserve/csrc -type f 2>/dev/null)
SANITIZED := build/asan/.stamp-built build/tsan/.stamp-built
SANITIZERS := $(SANITIZED:built=passed)
# gcc's thread sanitizer cannot map its shadow under high ASLR entropy: run without randomisation where allowed.
SANITIZED_RUN := $(shell setarch -R true 2>/dev/null && echo setarch -R)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# What was given to a process is taken on by one that has nothing left to do; neighbours share engines and models.
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast test-page test-parity test-kill test-native test-neon soak lint format types bench-batch bench-core bench-dense bench-host bench-peers bench-policy bench-prediction bench-server bench-slo release-check clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## virtual environment and native module (implied by everything below)

demo: setup  ## latency-sensitive and best-effort requests on a real model
	$(BIN)/omniserve demo

test: setup test-native  ## all tests but the full parity matrix and those in a browser
	$(PYTEST) -m "not full and not page"

test-fast: setup  ## tests that take a moment each
	$(PYTEST) -m "not full and not slow and not page"

test-page: setup $(BROWSER)  ## the live page in headless Chromium, over a real server; screenshots in build/page
	@scripts/preflight.sh --page
	$(BIN)/python -m pytest -m page tests/page

test-parity: setup  ## the full token-equality matrix
	$(BIN)/python -m pytest -m full

test-kill: setup  ## kill -9 under batches: at write boundaries, KILLS (200) times at random, SERVER_KILLS (40) in a real server
	OMNISERVE_KILLS=$(KILLS) $(BIN)/python -m pytest tests/batch/test_kill.py
	OMNISERVE_SERVER_KILLS=$(SERVER_KILLS) OMNISERVE_KILL_SEED=$(KILL_SEED) $(BIN)/python -m pytest -rP tests/server/test_random_kills.py

test-native: $(SANITIZERS)  ## the C++ tests under address, undefined-behaviour and thread sanitizers

test-neon: build/neon/.stamp-passed  ## the C++ tests for AArch64, on any machine under qemu

soak: $(SANITIZED)  ## random stress of lanes under the three sanitizers for SOAK_SECONDS (600), builds not counted
	$(SANITIZED_RUN) build/asan/omniserve_native_tests --soak $$(( $(SOAK_SECONDS) / 2 ))
	TSAN_OPTIONS=halt_on_error=1 $(SANITIZED_RUN) build/tsan/omniserve_native_tests --soak $$(( $(SOAK_SECONDS) - $(SOAK_SECONDS) / 2 ))

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## mypy --strict
	$(BIN)/mypy --strict src

bench-batch: setup  ## seconds and memory to accept a batch of 50,000 lines (200 MB; seconds)
	$(BIN)/python -m omniserve.bench.batch_accept --json results/batch_accept.json

bench-core: setup  ## start-up, lane tokens/s, cost of lane rows (several minutes)
	$(BIN)/python -m omniserve.bench.core $(FLAGS)

bench-dense: setup  ## dense work of a walk by number of rows and type of weights (two minutes)
	$(BIN)/python -m omniserve.bench.dense $(FLAGS)

bench-host: setup $(PLOTS)  ## host attention beside the memory's streaming rate and torch (several minutes)
	$(BIN)/omniserve bench-host --json results/host.json --plot results/host.svg

bench-peers: setup  ## our engine beside transformers, vLLM and llama.cpp, which it installs (half an hour; FLAGS=--quick)
	$(BIN)/python -m omniserve.bench.peers $(FLAGS)

bench-policy: setup  ## cost of a plan and of an admission (seconds; no model, no device)
	$(BIN)/python -m omniserve.bench.policy --json results/policy.json

bench-prediction: setup  ## predicted against measured walks, on this machine left alone (several minutes)
	$(BIN)/python -m omniserve.bench.prediction $(FLAGS)

bench-server: setup  ## what HTTP adds to the Python API at 64 open streams (minutes)
	$(BIN)/python -m omniserve.bench.server_cost $(FLAGS)

bench-slo: setup $(PLOTS)  ## targets kept and batch tokens made, beside the baselines (hours; FLAGS=--quick: minutes)
	$(BIN)/python -m omniserve.bench.slo --plot results/slo.svg $(FLAGS)

release-check: setup  ## sdist and wheel in dist/, tried out in an environment of their own (a few minutes)
	$(BIN)/python scripts/release_check.py

clean:  ## build outputs and caches, not the virtual environments
	if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name peers -exec rm -rf {} +; fi
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(INSTALLED)
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## the virtual environments too (a full download to get them back)
	rm -rf $(VENV) build

# Apart from the rest, so that `make -j` compiles for the sanitizers while pip still fetches torch.
$(TOOLS): pyproject.toml constraints.txt scripts/requirements.py
	PYTHON=$(PYTHON) scripts/preflight.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt pip
	$(BIN)/python scripts/requirements.py build > $(VENV)/requirements-build.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements-build.txt
	touch $@

# Build tools and every dependency first: the project is then built without isolation, hence without a second torch.
$(DEPS): $(TOOLS)
	$(BIN)/python scripts/requirements.py > $(VENV)/requirements.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt
	touch $@

$(PLOTS): $(DEPS)
	$(BIN)/python scripts/requirements.py plots > $(VENV)/requirements-plots.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements-plots.txt
	touch $@

$(BROWSER): $(DEPS)
	@scripts/preflight.sh --page
	$(BIN)/python scripts/requirements.py page > $(VENV)/requirements-page.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements-page.txt
	touch $@

$(INSTALLED): $(DEPS) $(NATIVE)
	$(PIP) install --no-build-isolation --no-deps -c constraints.txt -e .
	touch $@

build/%/.stamp-built: $(TOOLS) $(NATIVE)
	@mkdir -p build/$*
	$(BIN)/cmake -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DOMNISERVE_PYTHON=OFF \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" -DOMNISERVE_TESTS=ON -DOMNISERVE_SANITIZE=$(SANITIZE) > build/$*/configure.log \
	  || { cat build/$*/configure.log; exit 1; }
	$(BIN)/cmake --build build/$*
	touch $@

build/%/.stamp-passed: build/%/.stamp-built
	$(SANITIZED_RUN) build/$*/omniserve_native_tests
	touch $@

# The emulated CPU is an ARMv8.0-A one: anything newer ends in an illegal instruction.
build/neon/.stamp-passed: $(TOOLS) $(NATIVE) scripts/aarch64.cmake
	@scripts/preflight.sh --neon
	@mkdir -p build/neon
	$(BIN)/cmake -S . -B build/neon -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DOMNISERVE_PYTHON=OFF \
	  -DCMAKE_TOOLCHAIN_FILE=scripts/aarch64.cmake -DOMNISERVE_TESTS=ON > build/neon/configure.log \
	  || { cat build/neon/configure.log; exit 1; }
	$(BIN)/cmake --build build/neon
	qemu-aarch64 -cpu cortex-a57 build/neon/omniserve_native_tests
	touch $@

build/asan/.stamp-built: SANITIZE := address,undefined
build/tsan/.stamp-built: SANITIZE := thread
