#!/usr/bin/env bash
# Installs the programs that tests drive for real; says what is missing where it cannot.
set -euo pipefail
missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v shellcheck >/dev/null || missing+=(shellcheck)
((${#missing[@]})) || exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "tests that drive ${missing[*]} will be skipped: install them, or run 'make test' as root on Debian"
fi
