#!/usr/bin/env bash
# Lint, types and the whole test suite: bash scripts/test.sh [--python X.Y] [pytest's arguments]
# Makes .venv (or .venv-X.Y) on first use; from the second time on it needs no network.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

version=
if [[ ${1:-} == --python ]]; then
    version=${2:?--python wants a version, as in 3.12}
    shift 2
fi
base=$(find_python "$version")
use_venv "$base" "$root/.venv${version:+-$version}" dev
cd "$root"
"$python" -m engine.weights.default_model >/dev/null
"$python" -m ruff check
"$python" -m ruff format --check
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$python" -m pyright --pythonpath "$python" # it would ask the network for its newest version
exec "$python" -m pytest "$@"
