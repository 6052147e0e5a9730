# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
# uv does not read pip's settings; pass on where to find local wheels and which certificates to trust.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test test-quick lint lock vllm clean help

help:  ## Show these targets
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed  ## The review pipeline on this machine; REVIEWS=file.jsonl.gz takes real reviews
	@benchmarks/demo.sh $(BIN)/prefmill $(REVIEWS)

test: $(VENV)/.installed-vllm lint  ## Every test this machine can run
	$(BIN)/pytest

test-quick: $(VENV)/.installed  ## The inner loop, under 3 minutes
	$(BIN)/pytest -m "not slow" -x -q

lint: $(VENV)/.installed  ## ruff, mypy, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
