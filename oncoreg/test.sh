#!/bin/sh
# OncoReg's inference: test.sh TASK Val|Ts
# Reads /oncoreg/data (<TASK>_dataset.json there or in a folder below) and /oncoreg/model, writes /oncoreg/results.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: $0 TASK Val|Ts" >&2
    exit 2
fi
data=${ONCOREG_DATA:-/oncoreg/data}
results=${ONCOREG_RESULTS:-/oncoreg/results}
[ -d "$data/$1" ] && data=$data/$1
[ -z "${ONCOREG_MODEL:-}" ] || export DINOREG_WEIGHTS="$ONCOREG_MODEL"
app=$(dirname "$0")/..
[ -f "$app/process.py" ] || app=/opt/dinoreg
exec "${PYTHON:-python3}" "$app/process.py" --mode learn2reg --input "$data" --output "$results" --split "$2" \
    --log "$results/debug.log"
