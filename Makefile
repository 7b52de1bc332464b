# One command for each thing a contributor does; `make` alone lists them. CI runs the same targets (.ci/run).
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# pip chooses the build of torch: on Linux x86-64 the default is the CUDA one, several GB. For the CPU build, pass the index
# that PyTorch's install page names: make demo TORCH_PIP_ARGS="--index-url ...". It is read when torch is installed.
TORCH := torch==2.13.0
TORCH_PIP_ARGS ?=

# Tests run beside each other on few cores, so each process computes on one thread: two processes whose torch pools are as
# wide as the machine spin on one another. The allocator keeps large buffers instead of returning them after every message.
TEST_WORKERS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592
COVERAGE := build/coverage

PROTOS := $(wildcard proto/alora_serve/v1/*.proto)
STUBS := shared/alora_serve/v1/__init__.py
LAST_TAG := $(shell git describe --tags --abbrev=0 --match 'v*' 2>/dev/null)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.ready ## create .venv with what running needs (demo, bench and up do it by themselves)

$(VENV)/.ready: requirements.lock pyproject.toml hatch_build.py scripts/setup_venv.py scripts/install_torch.sh
	@$(PYTHON) scripts/setup_venv.py --venv $(VENV) --lock $< --torch $(TORCH) --torch-pip-args='$(TORCH_PIP_ARGS)'
	@touch $@

$(VENV)/.ready-dev: requirements-dev.lock $(VENV)/.ready
	@$(PYTHON) scripts/setup_venv.py --venv $(VENV) --lock $< --torch $(TORCH) --torch-pip-args='$(TORCH_PIP_ARGS)'
	@touch $@

.PHONY: proto
proto: $(VENV)/.ready ## generate the Python stubs from proto/
	@$(BIN)/python hatch_build.py

$(STUBS): $(PROTOS) hatch_build.py $(VENV)/.ready
	@$(BIN)/python hatch_build.py >/dev/null
	@touch $@

.PHONY: demo
demo: $(STUBS) ## a question about a document, guarded by adapters, through three real processes
	@$(BIN)/alora-serve demo $(ARGS)

.PHONY: up
up: $(STUBS) ## every service on this machine until Ctrl-C: make up ARGS="--workers 2"
	@$(BIN)/alora-serve up $(ARGS)

.PHONY: bench
bench: $(STUBS) ## the main benchmark, into build/bench/main.json
	@$(BIN)/python benchmarks/main.py $(ARGS)

.PHONY: bench-peers
bench-peers: $(VENV)/.ready-dev $(STUBS) ## us and our peers in one run: make bench-peers ARGS="--scenario a --tokens 2048"
	@$(BIN)/python benchmarks/compare.py $(ARGS)

.PHONY: bench-bars
bench-bars: $(VENV)/.ready-dev $(STUBS) ## the ratios that must hold, into build/bench/bars.json
	@$(BIN)/python benchmarks/measure_bars.py $(ARGS)

.PHONY: bench-sealed
bench-sealed: $(VENV)/.ready-dev $(STUBS) ## what sealing stored values costs, into build/bench/sealed.json
	@$(BIN)/python benchmarks/sealed_values.py $(ARGS)

.PHONY: bench-int8
bench-int8: $(VENV)/.ready-dev $(STUBS) ## what int8 weights change, in answers and in time, into build/bench/int8.json
	@$(BIN)/python benchmarks/int8_weights.py $(ARGS)

.PHONY: bench-profile
bench-profile: $(VENV)/.ready-dev $(STUBS) ## where a decode step's time goes, and a prefill's, into build/bench/step-profile.json
	@$(BIN)/python benchmarks/step_profile.py $(ARGS)

.PHONY: bench-training
bench-training: $(VENV)/.ready-dev $(STUBS) ## an aLoRA's training from kept KV, against PEFT alone, into build/bench/training.json
	@$(BIN)/python benchmarks/training_speed.py $(ARGS)

.PHONY: bench-llama
bench-llama: $(VENV)/.ready-dev $(STUBS) ## which settings llama-server is fastest with, into build/bench/llama-settings.json
	@$(BIN)/python benchmarks/try_llama.py $(ARGS)

.PHONY: bench-peft
bench-peft: $(VENV)/.ready-dev $(STUBS) ## which settings stock PEFT is fastest with, into build/bench/peft-settings.json
	@$(BIN)/python benchmarks/try_peft.py $(ARGS)

.PHONY: bench-threads
bench-threads: $(VENV)/.ready-dev $(STUBS) ## thread counts, waiting threads and allocators, into build/bench/threads.json
	@$(BIN)/python benchmarks/threads.py $(ARGS)

.PHONY: bench-pictures
bench-pictures: $(VENV)/.ready-dev ## draw what bench-peers measured, into docs/images
	@$(BIN)/python benchmarks/pictures.py $(ARGS)

.PHONY: format
format: $(VENV)/.ready-dev ## rewrite Python and proto files in the house format
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/buf format -w proto

.PHONY: lint
lint: $(VENV)/.ready-dev $(STUBS) ## ruff, mypy, import-linter, buf: what must hold before a commit
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/buf lint proto
	@$(BIN)/buf format -d --exit-code proto
ifeq ($(LAST_TAG),)
	@echo "buf breaking: skipped, this repository has no tag v* to compare with"
else
	@$(BIN)/buf breaking proto --against '.git#tag=$(LAST_TAG),subdir=proto'
endif

.PHONY: docs
docs: $(VENV)/.ready-dev ## docs/ as a site, in build/site; a link to nothing fails it (make test builds it, too)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: test
test: $(VENV)/.ready-dev $(STUBS) ## every test, on real servers, with branch coverage: make test ARGS="-k router"
	@rm -rf $(COVERAGE) && mkdir -p $(COVERAGE)
	@$(TEST_ENV) $(BIN)/coverage run -m pytest -n $(TEST_WORKERS) --durations=15 $(foreach part,deploy containers,--ignore=tests/$(part)) $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage html --quiet --directory $(COVERAGE)/html
	@$(BIN)/coverage json --quiet -o $(COVERAGE)/coverage.json
	@$(BIN)/python scripts/check_coverage.py $(COVERAGE)/coverage.json --total 85 --file 70

.PHONY: deploy-check
deploy-check: $(VENV)/.ready-dev $(STUBS) ## chart, images, rules, dashboards, by the real tools, which it fetches into build/tools
	@$(BIN)/python scripts/fetch_tools.py
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --durations=15 tests/deploy $(ARGS)

.PHONY: containers
containers: $(VENV)/.ready-dev $(STUBS) ## build the images, run Compose and the chart's pods on them (Linux, root, no Docker)
	@$(BIN)/python scripts/fetch_tools.py helm4 images
	@$(TEST_ENV) $(BIN)/python tests/containers/run_stage.py --torch $(TORCH) --torch-pip-args='$(TORCH_PIP_ARGS)' $(ARGS)

.PHONY: chaos
chaos: $(VENV)/.ready-dev $(STUBS) ## break a running deployment in every way it must survive: make chaos ARGS="--list"
	@$(TEST_ENV) ALORA_TEST_COLD_START=1 PYTHONPATH=tests/plugins $(BIN)/python tests/chaos/run_chaos.py $(ARGS)

.PHONY: interop
interop: $(VENV)/.ready-dev $(STUBS) ## every RPC from Node and buf, and 1,000 calls through Envoy while a router, then a worker, dies
	@mkdir -p build
	@$(TEST_ENV) ALORA_TEST_INTEROP_CALLS=1000 $(BIN)/python -m pytest --junitxml=build/interop.xml tests/interop $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.ready-dev $(STUBS) ## what a fuzzer can think of, for every parser: make fuzz ARGS="--seconds 600"
	@$(TEST_ENV) PYTHONPATH=tests/plugins $(BIN)/python tests/fuzz/run_fuzz.py $(ARGS)

# Torch is overridden away because its build depends on the machine (scripts/install_torch.sh installs it); the group of its
# name is what it needs of the locks. The second lock is the first plus the tools, at the same versions.
UV_COMPILE_ALONE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"
UV_COMPILE = $(UV_COMPILE_ALONE) --overrides <(echo 'torch ; sys_platform == "never"') --no-emit-package torch \
	pyproject.toml --extra model --extra http --group build --group torch

.PHONY: lock
lock: ## resolve the dependencies anew into requirements*.lock (with the uv of .venv)
	@$(UV_COMPILE) --upgrade -o requirements.lock >/dev/null
	@$(UV_COMPILE) --group dev --constraints requirements.lock -o requirements-dev.lock >/dev/null
	@$(UV_COMPILE_ALONE) pyproject.toml --constraints requirements.lock -o requirements-router.lock >/dev/null
	@$(UV_COMPILE_ALONE) pyproject.toml --extra http --constraints requirements.lock -o requirements-http.lock >/dev/null
	@$(UV_COMPILE_ALONE) tests/interop/mellea/requirements.in -o tests/interop/mellea/requirements.lock >/dev/null
	@$(UV_COMPILE_ALONE) --group build --constraints requirements.lock -o requirements-build.lock >/dev/null

.PHONY: clean
clean: ## remove what builds, tests and linters leave (.venv stays)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage .coverage.* $(dir $(STUBS))
