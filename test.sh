#!/usr/bin/env bash
# Sets everything up (once), then checks style and types and runs the tests.
#   ./test.sh [pytest arguments]              style, types, the fast tests
#   ./test.sh --all [pytest arguments]        the slow ones too
#   ./test.sh --container [build.sh options]  builds the image and runs it under the platforms' rules (takes no style or types)
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
python=$("$root/tools/venv.sh" --test)
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # see run.sh

if [ "${1:-}" = --container ]; then
    shift
    source "$root/tools/engine.sh"
    engine='' tag=dinoreg:$(code_version)
    arguments=("$@")
    for ((i = 0; i < $# - 1; i++)); do
        case ${arguments[i]} in
            --engine) engine=${arguments[i + 1]} ;;
            --tag) tag=${arguments[i + 1]} ;;
        esac
    done
    engine=$(find_engine "$engine")
    ./build.sh --weights none --engine "$engine" "$@"
    PYTHONPATH=$root/test exec "$python" -m container.check --image "$tag" --engine "$engine"
fi

selection=(-m "not slow and not container")
if [ "${1:-}" = --all ]; then
    shift
    selection=(-m "not container")
fi
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest "${selection[@]}" "$@"
