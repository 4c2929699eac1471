#!/usr/bin/env bash
# Sets everything up (once) and registers.
#   ./run.sh                         the bundled example, to ./output, with a table of what it brought
#   ./run.sh INPUT OUTPUT [options]  any input; the options are those of process.py (--preset, --features, --weights ...)
# Needs Python 3.10, 3.11 or 3.12 and, the first time, a package index. $DINOREG_VENV: where the virtual environment goes.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; fi
if [ $# -eq 1 ] || [[ "${1:-}" == -* ]]; then
    echo "usage: ./run.sh, or ./run.sh INPUT OUTPUT [options]" >&2
    exit 2
fi

python=$("$root/tools/venv.sh")
# Threads that wait must sleep: spinning, two threads on a shared processor are ten times slower than one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

if [ $# -ge 2 ]; then
    input=$1 output=$2
    shift 2
    mkdir -p "$output"
    exec "$python" "$root/process.py" --input "$input" --output "$output" "$@"
fi

# Without arguments: the example, with DINOv2 if a checkpoint is there or the smallest comes within a minute, else with MIND alone.
input=$root/test/input output=$root/output features=dinov2+mind
if ! compgen -G "$root/weights/*.pth" > /dev/null && ! "$python" "$root/weights/fetch.py" vits14_reg4 --timeout 60; then
    features=mind
    printf '%s\n' '' '*** NO DINOv2 WEIGHTS: they are not here and could not be fetched (see the line above).' \
        '*** Going on with MIND features alone. This is not what DINO-Reg is meant to be run with.' \
        "*** The report says so too. To fetch them later: python weights/fetch.py vits14_reg4" ''
fi
mkdir -p "$output"
"$python" "$root/process.py" --input "$input" --output "$output" --features "$features"
echo
(cd "$root" && "$python" -m dinoreg evaluate "$input" "$output")
echo
echo "field:        $(ls "$output"/disp_*.nii.gz)"
echo "warped image: $(ls "$output"/warped/*.nii.gz)"
pictures=$(find "$output" -name '*.png' | sort)
[ -z "$pictures" ] || echo "picture:      $pictures"
echo "report:       $output/report.json"
[ "$features" = dinov2+mind ] || echo "*** without DINOv2 weights: MIND features alone"
