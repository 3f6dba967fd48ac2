#!/usr/bin/env bash
# Ask the default model a question, from nothing: bash scripts/quickstart.sh "Why is the sky blue?"
# Makes .venv, installs Quire, fetches the model; from the second time on it needs no network.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[[ $# -gt 0 ]] || fail 'usage: bash scripts/quickstart.sh "Why is the sky blue?"'
base=$(find_python)
use_venv "$base" "$root/.venv"
exec "$python" -m engine.generate "$@"
