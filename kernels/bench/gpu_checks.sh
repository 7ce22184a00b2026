#!/usr/bin/env bash
# Everything that needs a GPU, in one call, on a machine with torch and triton only:
#
#   kernels/bench/gpu_checks.sh [--tune AXIS]
#
# Kernel tests where pytest is installed, then checks and benchmark. Reports go to $OUT, else to kernels/bench/results.
# PYTHON names the interpreter, LIMIT_S the time for each of the two steps.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-$PWD/kernels/bench/results}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} FLA_FLASH_KDA=0
python=${PYTHON:-python3}
mkdir -p "$OUT"
status=0

if "$python" -c 'import pytest' 2>/dev/null; then
    timeout "${LIMIT_S:-220}" "$python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . \
        tests/unit/kernels/triton_cases/{kda,scalar_gates,kv_pack}.py >"$OUT/tests.txt" 2>&1 || status=$?
    tail -n 15 "$OUT/tests.txt"
else
    echo "pytest is not installed: the benchmark's own checks only"
fi
if [ "$status" -ne 0 ]; then
    echo "the kernel tests are red: no benchmark" >&2
    exit "$status"
fi
timeout "${LIMIT_S:-220}" "$python" kernels/bench --quick --out "$OUT" "$@"
