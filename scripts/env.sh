# Sourced by the other scripts: where the repository is, which Python to use, and a virtual environment that follows
# pyproject.toml. Nothing is asked of the network when nothing has changed.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $*" >&2
    exit 1
}

# find_python [X.Y] -> prints the first supported Python (of that version), from PATH or pyenv.
find_python() {
    local wanted=${1:-} candidate version
    for candidate in python3 python3.13 python3.12 python3.11 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in
            3.11 | 3.12 | 3.13) [[ -z $wanted || $version == "$wanted" ]] && command -v "$candidate" && return ;;
        esac
    done
    fail "no Python ${wanted:-3.11 to 3.13} found on PATH or in pyenv; Quire runs on 3.11, 3.12 and 3.13"
}

# use_venv PYTHON VENV [EXTRA] -> sets $python to VENV's, with the project and its EXTRA installed in editable mode.
use_venv() {
    local base=$1 venv=$2 extra=${3:-} log=$2/install.log
    local made_for installed=$venv/installed${extra:+-$extra}.toml
    python=$venv/bin/python
    made_for="$root $("$base" -VV)"
    if [[ ! -x $python || $(cat "$venv/made-for" 2>/dev/null) != "$made_for" ]]; then
        rm -rf "$venv"
        "$base" -m venv "$venv" >/dev/null 2>&1 ||
            fail "$base cannot make a virtual environment at $venv; on Debian: apt install python3-venv"
        echo "$made_for" >"$venv/made-for"
    fi
    cmp -s "$root/pyproject.toml" "$installed" && return
    echo "Installing Quire into $venv (once, a minute or two)" >&2
    "$python" -m pip install --editable "$root${extra:+[$extra]}" >"$log" 2>&1 ||
        fail "pip could not install Quire; is the package registry reachable? ($(sed -n 's/^ *ERROR: *//p' "$log" | tail -1)) Log: $log"
    cp "$root/pyproject.toml" "$installed"
    [[ -z $extra ]] || cp "$root/pyproject.toml" "$venv/installed.toml" # whoever has the extra has the rest
}
