# shellcheck shell=bash
# Sourced by every script here, on the node; the checkout that holds it is where the job works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# In place of this shell, so that Slurm's warning reaches it.
job() { exec "${PREFMILL_PYTHON:-.venv/bin/python}" -m prefmill.slurm.job "$@"; }
stage() { job --stage "$@"; }
