#!/usr/bin/env bash
# Makes .venv in the repository and installs Caesura into it, editable. Returns at once when that is already done.
#
#   scripts/setup_env.sh [--dev]     --dev adds what the tests and checks need
#
# Needs Python 3.11 or newer with pip; PYTHON names another interpreter than python3. Without an NVIDIA GPU the
# constraints of constraints-cpu.txt hold.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=${PYTHON:-python3}
extra=${1:-}
case $extra in
  "" | --dev) ;;
  *)
    echo "setup_env.sh: unknown argument '$extra'; only --dev is known" >&2
    exit 2
    ;;
esac

# What the installation depends on; a change of any of it, or a move of the checkout, installs anew.
key=$(printf '%s ' "$root"; cat "$root/pyproject.toml" "$root/constraints-cpu.txt" | cksum)
is_done() { [ -f "$venv/$1" ] && [ "$(cat "$venv/$1")" = "$key" ]; }
if is_done installed-dev || { [ -z "$extra" ] && is_done installed; }; then
  exit 0
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "setup_env.sh: '$python' is no Python 3.11 or newer; set PYTHON to one" >&2
  exit 1
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
  echo "setup_env.sh: '$python' has no pip; install it, or set PYTHON to an interpreter that has" >&2
  exit 1
fi

constraints=(--constraint "$root/constraints-cpu.txt")
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  constraints=()
fi

echo "setup_env.sh: installing into $venv (once; this may take some minutes)" >&2
# The interpreter's own pip installs into the new environment, so ensurepip, which some systems lack, is not needed.
"$python" -m venv --without-pip "$venv"
rm -f "$venv/installed" "$venv/installed-dev"
"$python" -m pip --python "$venv/bin/python" install --quiet ${constraints[@]+"${constraints[@]}"} \
  --editable "$root${extra:+[dev]}" >&2
printf '%s' "$key" >"$venv/installed${extra:+-dev}"
