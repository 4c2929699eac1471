#!/usr/bin/env bash
# Makes the virtual environment, or completes it, and prints the path of its Python: tools/venv.sh [--test]
# It is .venv in the repository, or $DINOREG_VENV. Nothing is installed again until the requirements change. --test adds
# requirements-test.txt. Installing goes to stderr.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DINOREG_VENV:-$root/.venv}
fail() { echo "error: $*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null; }
find_python() {
    local candidate
    for candidate in python3 python3.12 python3.11 python3.10; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    fail "no Python 3.10, 3.11 or 3.12 found (python3 is $(python3 --version 2>&1 | head -n 1 || true)); install one of them"
}

marker=$venv/.dinoreg-installing lock=$venv/.dinoreg-lock
if [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ ! -e "$lock" ]; then
    fail "$venv is there and is no virtual environment; remove it, or name another place in DINOREG_VENV"
fi

# One at a time: run.sh and test.sh may be started together.
mkdir -p "$venv"
if command -v flock > /dev/null; then
    exec 9> "$lock"
    flock 9
else
    touch "$lock"
fi

# A set-up that was cut off is thrown away: a package may be there by half and look whole. But never an environment of the user's own.
made=$venv/.dinoreg-made
if [ -e "$marker" ] && [ -e "$made" ]; then
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$lock" -exec rm -rf {} +
fi
if [ ! -f "$venv/pyvenv.cfg" ]; then
    python=$(find_python)
    echo "making the virtual environment $venv with $("$python" --version)" >&2
    touch "$marker" "$made"
    "$python" -m venv "$venv" >&2 ||
        fail "$python cannot make a virtual environment; on Debian and Ubuntu, install the package python3-venv"
fi
supported "$venv/bin/python" || fail "the Python in $venv is not 3.10, 3.11 or 3.12; remove $venv and run this again"

# install NAME FILE...: runs the function install_NAME once for these contents of the files.
install() {
    local name=$1 stamp=$venv/.dinoreg-$1 hash
    shift
    hash=$(cat "$@" | sha256sum)
    if [ "$(cat "$stamp" 2> /dev/null || true)" != "$hash" ]; then
        touch "$marker"
        echo "installing $name into $venv (once; several minutes on a slow connection)" >&2
        "install_$name" >&2
        echo "$hash" > "$stamp"
    fi
}
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
# The lock first: then requirements.txt finds all but torch there, whose build (CPU, CUDA) is the user's to choose.
install_requirements() {
    "${pip[@]}" --require-hashes --no-deps --requirement "$root/locks/packages.txt"
    "${pip[@]}" --requirement "$root/requirements.txt"
}
install_test_requirements() { "${pip[@]}" --requirement "$root/requirements-test.txt"; }

install requirements "$root/requirements.txt" "$root/locks/packages.txt"
[ "${1:-}" != --test ] || install test_requirements "$root/requirements.txt" "$root/requirements-test.txt"
rm -f "$marker"
echo "$venv/bin/python"
