#!/usr/bin/env bash
# Makes a virtual environment with SGLang and this project in it. Does nothing where that is done already.
#
#   VENV=DIR      where (default: .venv below the repository)
#   PYTHON=EXE    a Python 3.11 to 3.13 to make it with (default: the first one found)
#
# Exit status: 0 installed or up to date, 1 failed (says why and what to do), 130 interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
VENV=${VENV:-.venv}
need_gb=12
tmp_gb=5

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# --- nothing to do? -------------------------------------------------------------------------------------------------

key=$(cat constraints.txt pyproject.toml scripts/install.sh sglang_prfaas/transport/_vectored.c | sha256sum | cut -c1-32)
stamp=$VENV/.prfaas-installed      # "<key> <native or python> <root>" of the last complete install
begun=$VENV/.prfaas-begun          # exists from the start of an install until its end
made=$VENV/.prfaas-made            # exists in environments that this script made, and may make again

native=sglang_prfaas/transport/_vectored     # built from C into the checkout, where there is a compiler
built() { [ -n "$(find "${native%/*}" -name "${native##*/}.*.so" -newer $native.c)" ]; }
up_to_date() {
    [ -x "$VENV/bin/python" ] && [ ! -e "$begun" ] || return 1
    case $(cat "$stamp" 2>/dev/null) in
        "$key native $root") built ;;
        "$key python $root") true ;;
        *) false ;;
    esac
}
if up_to_date; then exit 0; fi

# --- one at a time --------------------------------------------------------------------------------------------------

mkdir -p "$VENV" || die "cannot make $VENV; set VENV= to a directory you may write to"
lock=$VENV/.prfaas-lock
exec 9>"$lock" || die "cannot write to $VENV; set VENV= to a directory you may write to"
if command -v flock >/dev/null; then
    if ! flock -n 9; then
        say "another install into $VENV is running; waiting for it"
        flock 9
    fi
    if up_to_date; then exit 0; fi
else
    say "flock (util-linux) was not found: do not run two installs into $VENV at once"
fi

# --- Python ---------------------------------------------------------------------------------------------------------

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13"
        echo "$PYTHON"
        return
    fi
    local name
    for name in python3.12 python3.11 python3.13 python3 python; do
        if command -v "$name" >/dev/null && suits "$name"; then
            command -v "$name"
            return
        fi
    done
    die "no Python 3.11, 3.12 or 3.13 was found; install one (Debian, Ubuntu: apt install python3 python3-venv)" \
        "or write PYTHON=/path/to/python3"
}

free_gb() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 { printf "%d", $4 / 1048576 }'; }

if [ -e "$begun" ] && [ -e "$made" ]; then
    say "the last install into $VENV was interrupted; starting it afresh (downloads are cached)"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name .prfaas-lock -exec rm -rf {} +
fi
if [ ! -x "$VENV/bin/python" ]; then
    python=$(find_python)
    say "making $VENV with $("$python" --version 2>&1)"
    : >"$begun"
    : >"$made"
    if ! "$python" -m venv "$VENV" >"$VENV/install.log" 2>&1; then
        tail -n 5 "$VENV/install.log" >&2
        die "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
    fi
fi
python=$VENV/bin/python
suits "$python" || die "$VENV holds $("$python" --version 2>&1); 3.11 to 3.13 is needed: remove $VENV or set VENV="

# --- pip, or uv where there is no pip -------------------------------------------------------------------------------

if "$python" -m pip --version >/dev/null 2>&1; then
    installer=("$python" -m pip install --no-input --disable-pip-version-check --progress-bar off)
elif command -v uv >/dev/null || [ -x "$VENV/bin/uv" ]; then
    uv=$(command -v uv || echo "$VENV/bin/uv")
    installer=("$uv" pip install --python "$python")
elif "$python" -m ensurepip >/dev/null 2>&1; then
    installer=("$python" -m pip install --no-input --disable-pip-version-check --progress-bar off)
else
    die "$VENV has neither pip nor uv; run: $python -m ensurepip, or put uv on PATH"
fi

# --- install --------------------------------------------------------------------------------------------------------

has_sglang() { [ -d "$(echo "$VENV"/lib/python3.*/site-packages/torch)" ]; }
if ! has_sglang; then
    free=$(free_gb "$VENV")
    if [ -n "$free" ] && [ "$free" -lt "$need_gb" ]; then
        die "$VENV has $free GB free, the install needs $need_gb GB; make room, or set VENV= to a larger disk"
    fi
    free=$(free_gb "${TMPDIR:-/tmp}")
    if [ -n "$free" ] && [ "$free" -lt "$tmp_gb" ]; then
        mkdir -p "$VENV/tmp"
        export TMPDIR=$PWD/$VENV/tmp
        case $VENV in /*) TMPDIR=$VENV/tmp ;; esac
    fi
fi

log=$VENV/install.log
child=
on_signal() {
    trap - INT TERM HUP
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    [ -z "$child" ] || wait "$child" 2>/dev/null || true
    [ ! -t 2 ] || printf '\n' >&2
    say "interrupted; the next run starts over"
    exit 130
}
trap on_signal INT TERM HUP

explain() {
    local text
    text=$(tail -n 200 "$log")
    tail -n 15 "$log" | sed 's/^/  | /' >&2
    case $text in
        *"No space left on device"* | *"Disk quota exceeded"*)
            die "the disk is full; $need_gb GB are needed in $VENV and $tmp_gb GB in ${TMPDIR:-/tmp}: make room, or set VENV= and TMPDIR=" ;;
        *"name resolution"* | *NewConnectionError* | *ConnectTimeout* | *"Read timed out"* | *"Connection refused"* | *"onnection reset"* | *"rror sending request"* | *"dns error"* | *ProxyError* | *SSLError*)
            die "the package registry could not be reached; check the network, or pip's index and proxy settings, and run again" ;;
        *"No matching distribution found"* | *"no version of"* | *"No solution found"*)
            die "the registry has no package that fits; is it complete, and are this Python and platform supported? (Linux on x86-64 or arm64)" ;;
    esac
    die "the install failed; the whole log is $log"
}

# Runs an installer with its output in the log, and says every few seconds how far it is. The installer inherits the
# lock, so that no other install begins while one that lost this script still runs.
progress() {
    local start=$SECONDS shown=0 line free_before
    free_before=$(free_gb "$VENV")
    "$@" >>"$log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 1
        line=$(tail -n 1 "$log" | tr -d '\r' | sed -E 's/^ +//; s#(file|https?)://[^ ]*/##g' | cut -c1-80)
        if [ -t 2 ]; then
            printf '\rinstall: %4d s, %2d GB: %-80s' $((SECONDS - start)) $((free_before - $(free_gb "$VENV"))) "$line" >&2
        elif [ $((SECONDS - shown)) -ge 15 ]; then
            shown=$SECONDS
            say "$((SECONDS - start)) s, $((free_before - $(free_gb "$VENV"))) GB: $line"
        fi
    done
    [ ! -t 2 ] || printf '\n' >&2
    local status=0
    wait "$child" || status=$?
    child=
    [ "$status" -eq 0 ] || explain
}

: >"$begun"
: >"$log"
rm -f $native"$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
installed=$(cut -d ' ' -f 1 "$stamp" 2>/dev/null || true)
if [ "$installed" = "$key" ]; then
    say "pointing $VENV at this checkout"
    progress "${installer[@]}" --no-deps -e .
else
    if has_sglang; then
        say "bringing $VENV up to date"
    else
        say "installing SGLang and this project into $VENV: about 4 GB to download, 11 GB on disk, 4 minutes or more"
    fi
    progress "${installer[@]}" -c constraints.txt -e ".[sglang,mooncake,dev]"
fi
rm -rf "$VENV/tmp"
"$python" -c 'import msgspec, zmq, torch, sglang_prfaas; from importlib.metadata import version; version("sglang")' >>"$log" 2>&1 || explain
why_not_native=$("$python" -c 'from sglang_prfaas.transport.vector import why_not_native as why; print(why)' 2>>"$log") || explain
echo "$key $([ -n "$why_not_native" ] && echo python || echo native) $root" >"$stamp"
rm -f "$begun"
say "done: $VENV"
if [ -n "$why_not_native" ]; then
    say "the mover moves KVCache in Python, which takes more CPU time: $why_not_native; afterwards: rm $stamp, make install"
fi
if command -v ldconfig >/dev/null && [[ $(ldconfig -p) != *libibverbs.so.1* ]]; then
    say "libibverbs.so.1 is missing, so tests with Mooncake are skipped; Debian and Ubuntu: apt install libibverbs1"
fi
