#!/usr/bin/env bash
# Everything that needs a GPU, in one call and under eight minutes, on a machine with torch and triton only:
#
#   kernels/bench/gpu_checks.sh [--plan] [--tune AXIS]
#
# Kernel tests where pytest is installed (all files at once: compiling takes most of their time), then the benchmark with
# its own checks. Reports go to $OUT, else to kernels/bench/results. --plan says what would run, and needs no GPU.
#   PYTHON    the interpreter (python3)
#   LIMIT_S   seconds for each of the two steps (220)
#   WHEELS    wheels to add for this run, such as "fla_core-0.6.0-py3-none-any.whl einops-0.8.1-py3-none-any.whl"
set -uo pipefail
wheels=()
for wheel in ${WHEELS:-}; do
    wheels+=("$(realpath "$wheel")")
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-$PWD/kernels/bench/results}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} FLA_FLASH_KDA=0
python=${PYTHON:-python3}
limit_s=${LIMIT_S:-220}
cases=(kda scalar_gates segments full_attention kv_pack)
plan=0
options=(--quick)
for argument in "$@"; do
    if [ "$argument" = --plan ]; then plan=1; else options+=("$argument"); fi
done

extra=$(mktemp -d)
trap 'rm -rf "$extra"' EXIT
for wheel in ${wheels[@]+"${wheels[@]}"}; do
    "$python" -m zipfile -e "$wheel" "$extra" || exit 1
    export PYTHONPATH=$PYTHONPATH:$extra
done
has_pytest=0
if "$python" -c 'import pytest' 2>/dev/null; then has_pytest=1; fi

if [ "$plan" -eq 1 ]; then
    for name in "${cases[@]}"; do
        if [ ! -f "tests/unit/kernels/triton_cases/$name.py" ]; then
            echo "tests/unit/kernels/triton_cases/$name.py is missing" >&2
            exit 1
        fi
    done
    if [ "$has_pytest" -eq 1 ]; then
        echo "tests: ${cases[*]}, at most $limit_s s"
    else
        echo "tests: none, pytest is not installed"
    fi
    exec "$python" kernels/bench --plan --out "$OUT" "${options[@]}"
fi

mkdir -p "$OUT"
status=0
if [ "$has_pytest" -eq 1 ]; then
    jobs=()
    for name in "${cases[@]}"; do
        timeout "$limit_s" "$python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . \
            "tests/unit/kernels/triton_cases/$name.py" >"$OUT/tests-$name.txt" 2>&1 &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do
        wait "$job" || status=$?
    done
    for name in "${cases[@]}"; do
        echo "$name: $(tail -n 1 "$OUT/tests-$name.txt")"
        grep -E '^(FAILED|ERROR)' "$OUT/tests-$name.txt" | head -n 12
    done
else
    echo "pytest is not installed: the benchmark's own checks only"
fi
if [ "$status" -ne 0 ]; then
    echo "the kernel tests are red: no benchmark" >&2
    exit "$status"
fi
timeout "$limit_s" "$python" kernels/bench --out "$OUT" "${options[@]}"
