#!/usr/bin/env bash
# The suite on another Python: bash scripts/test_python.sh 3.12 [pytest's arguments]

exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" --python "${1:?which Python? 3.11, 3.12 or 3.13}" "${@:2}"
