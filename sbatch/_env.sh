# shellcheck shell=bash
# Sourced by every script here, on the node. PREFMILL_HOME is the checkout; by default the folder sbatch was called in.
set -euo pipefail
cd "${PREFMILL_HOME:-${SLURM_SUBMIT_DIR:-.}}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
stage() { exec "${PREFMILL_PYTHON:-.venv/bin/python}" -m "stages.$1" "${@:2}"; }
