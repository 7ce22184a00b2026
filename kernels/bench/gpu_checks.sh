#!/usr/bin/env bash
# Everything that needs a GPU, in one call and under eight minutes, on a machine with torch and triton only:
#
#   kernels/bench/gpu_checks.sh [--plan] [--tune AXIS]
#
# Tests of the kernels and of the mover's device memory (it wants a wheel of msgspec) where pytest is installed, all files
# at once: compiling takes most of their time; then the benchmark, part by part, each with its own checks. A step that fails or runs out of time does not end the others; the exit status is that
# of the first that failed. Reports go to $OUT, else to kernels/bench/results: tests.txt, report.json, report.md,
# bench.txt, and summary.txt with one line for each step. --plan says what would run, and needs no GPU.
#   PYTHON    the interpreter (python3)
#   TOTAL_S   seconds for all steps together (460)
#   TESTS_S   seconds for the tests among them (150)
#   PART_S    seconds for a part of the benchmark (150)
#   WHEELS    wheels to add for this run, such as "fla_core-0.6.0-py3-none-any.whl einops-0.8.1-py3-none-any.whl"
set -uo pipefail
python=${PYTHON:-python3}
total_s=${TOTAL_S:-460}
tests_s=${TESTS_S:-150}
part_s=${PART_S:-150}
cases=(unit/kernels/triton_cases/{kda,scalar_gates,segments,full_attention,kv_pack} unit/transport/test_device_memory)
parts=(kda gdn kv_pack lightning attention)
plan=0
tune=()
while [ $# -gt 0 ]; do
    case $1 in
        --plan) plan=1 ;;
        --tune) tune=(--tune "${2:?--tune needs an axis}"); shift ;;
        *) echo "unknown argument $1: gpu_checks.sh [--plan] [--tune AXIS]" >&2; exit 2 ;;
    esac
    shift
done
wheels=()
for wheel in ${WHEELS:-}; do
    wheels+=("$(realpath "$wheel")")
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export OUT=${OUT:-$PWD/kernels/bench/results}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export BENCH_COMMAND="kernels/bench/gpu_checks.sh${tune[*]:+ ${tune[*]}}"

extra=$(mktemp -d)
trap 'rm -rf "$extra"' EXIT
for wheel in ${wheels[@]+"${wheels[@]}"}; do
    "$python" -m zipfile -e "$wheel" "$extra" || echo "$wheel can't be unpacked: its arms will take no part" >&2
done
PYTHONPATH=$PYTHONPATH:$extra
has_pytest=0
if "$python" -c 'import pytest' 2>/dev/null; then has_pytest=1; fi

if [ "$plan" -eq 1 ]; then
    for name in "${cases[@]}"; do
        if [ ! -f "tests/$name.py" ]; then
            echo "tests/$name.py is missing" >&2
            exit 1
        fi
    done
    if [ "$has_pytest" -eq 1 ]; then
        echo "tests: ${cases[*]##*/}, at most $tests_s s"
    else
        echo "tests: none, pytest is not installed"
    fi
    echo "benchmark: ${parts[*]}, at most $part_s s each, $total_s s in all"
    "$python" kernels/bench --plan --quick --out "$OUT" --parts "${parts[@]}" ${tune[@]+"${tune[@]}"}
    exit
fi

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no GPU that torch of $python can use: nothing to check (--plan works without one)" >&2
    exit 2
fi

mkdir -p "$OUT"
rm -f "$OUT"/{report.json,report.md,bench.txt,tests.txt,summary.txt}
status=0

left_s() { # seconds that a step may take, of at most $1
    local left=$((total_s - SECONDS))
    echo $((left < $1 ? left : $1))
}

conclude() { # one line on a step: its name, its exit status, since when
    local verdict=ok
    if [ "$2" -eq 124 ] || [ "$2" -eq 137 ]; then verdict="out of time"; elif [ "$2" -ne 0 ]; then verdict="failed ($2)"; fi
    if [ "$status" -eq 0 ]; then status=$2; fi
    echo "$1: $verdict after $((SECONDS - $3)) s" | tee -a "$OUT/summary.txt"
}

run_tests() {
    local jobs=() name job worst=0
    for name in "${cases[@]}"; do
        timeout -k 5 "$tests_s" "$python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . \
            "tests/$name.py" >"$extra/tests-${name##*/}.txt" 2>&1 &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do
        wait "$job" || worst=$?
    done
    for name in "${cases[@]}"; do
        echo "== $name"
        cat "$extra/tests-${name##*/}.txt"
    done >"$OUT/tests.txt"
    for name in "${cases[@]}"; do
        echo "${name##*/}: $(tail -n 1 "$extra/tests-${name##*/}.txt")"
        grep -E '^(FAILED|ERROR)' "$extra/tests-${name##*/}.txt" | head -n 12
    done
    return "$worst"
}

run_part() {
    local limit_s
    limit_s=$(left_s "$part_s")
    if [ "$limit_s" -lt 1 ]; then
        return 124
    fi
    timeout -k 5 "$limit_s" "$python" -u kernels/bench --quick --add --out "$OUT" --parts "$@" 2>&1 | tee -a "$OUT/bench.txt"
}

if [ "$has_pytest" -eq 1 ]; then
    begun=$SECONDS
    tests_s=$(left_s "$tests_s")
    run_tests
    conclude tests $? "$begun"
else
    echo "tests: none, pytest is not installed" | tee -a "$OUT/summary.txt"
fi
for part in "${parts[@]}"; do
    begun=$SECONDS
    run_part "$part" >/dev/null
    conclude "benchmark of $part" $? "$begun"
done
if [ "${#tune[@]}" -gt 0 ]; then
    begun=$SECONDS
    run_part "${tune[@]}" >/dev/null
    conclude "tuning of ${tune[1]}" $? "$begun"
fi
cat "$OUT/report.md" 2>/dev/null
cat "$OUT/summary.txt"
exit "$status"
