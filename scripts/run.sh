#!/usr/bin/env bash
# Sets up the environment if needed and serves: scripts/run.sh [MODEL] [flags of `caesura serve`].
# Without a model, the one that ships with Caesura.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup_env.sh"
exec "$root/.venv/bin/caesura" serve "$@"
