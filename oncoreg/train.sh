#!/bin/sh
# OncoReg's training: train.sh TASK. The method is not trained: this checks that it finds its weights, and says so.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 TASK" >&2
    exit 2
fi
app=$(dirname "$0")/..
[ -f "$app/process.py" ] || app=/opt/dinoreg
[ -z "${ONCOREG_MODEL:-}" ] || export DINOREG_WEIGHTS="$ONCOREG_MODEL"
export PYTHONPATH="$app${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" - "$1" "${ONCOREG_RESULTS:-/oncoreg/results}/debug.log" <<'EOF'
import logging
import sys
from pathlib import Path

from dinoreg.config import auto_preset, get_preset
from dinoreg.errors import DinoRegError
from dinoreg.registration import Registrar
from process import set_up_logging

task, log = sys.argv[1:]
try:
    set_up_logging(Path(log))
    preset = auto_preset(task, ())
    Registrar(get_preset(preset))  # verifies and loads the weights, and logs which
    logging.info("%s: training-free, nothing to train; the weights for preset %s are ready", task, preset)
except DinoRegError as error:
    logging.error("%s", error)
    sys.stderr.write(f"dinoreg: {error}\n")
    sys.exit(error.exit_code)
EOF
