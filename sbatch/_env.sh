# shellcheck shell=bash
# Sourced by every script here, on the node. PREFMILL_HOME is the checkout; by default the folder sbatch was called in.
set -euo pipefail
cd "${PREFMILL_HOME:-${SLURM_SUBMIT_DIR:-.}}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# In place of this shell, so that Slurm's warning reaches it.
job() { exec "${PREFMILL_PYTHON:-.venv/bin/python}" -m prefmill.slurm.job "$@"; }
stage() { job --stage "$@"; }
