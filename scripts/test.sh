#!/usr/bin/env bash
# Sets up the environment if needed and runs the tests: scripts/test.sh [--slow] [arguments of pytest].
# --slow adds the long soaks and sweeps. Two processes share the tests: many wait for most of their
# time. `-n 0` runs them in one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup_env.sh" --dev
select=(-m "not slow")
if [ "${1:-}" = --slow ]; then
  select=()
  shift
fi
cd "$root"
exec .venv/bin/python -m pytest -n 2 ${select[@]+"${select[@]}"} "$@"
