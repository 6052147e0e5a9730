#!/usr/bin/env bash
# Installs the programs that tests drive for real: Slurm with its database, and Chromium; and those given by name.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
declare -A package=(
  [chromium]=chromium [munged]=munge [mariadbd]=mariadb-server
  [slurmctld]=slurmctld [slurmd]=slurmd [slurmdbd]=slurmdbd [sbatch]=slurm-client
)
for name in "$@"; do package[$name]=$name; done
missing=()
# PREFMILL_TEST_WITHOUT=slurm,chromium: these are left out, and so are their tests.
without=",${PREFMILL_TEST_WITHOUT:-},"
[[ $without == *,chromium,* ]] && unset "package[chromium]"
[[ $without == *,slurm,* ]] && unset "package[munged]" "package[mariadbd]" "package[slurmctld]" "package[slurmd]" "package[slurmdbd]" "package[sbatch]"
for command in "${!package[@]}"; do
  command -v "$command" >/dev/null || missing+=("${package[$command]}")
done
((${#missing[@]})) || exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "not installed: ${missing[*]}. Run this as root on Debian, or set PREFMILL_TEST_WITHOUT=slurm,chromium to leave their tests out." >&2
  exit 1
fi
# Debian starts daemons as it installs them; the tests start their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
[[ $without == *,slurm,* ]] || missing+=(slurm-wlm-basic-plugins slurm-wlm-mysql-plugin)
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
