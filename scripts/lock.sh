#!/usr/bin/env bash
# Writes constraints.txt from the packages of a virtual environment: names and versions only.
#
#   VENV=DIR    the environment (default: .venv below the repository)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
new=$(mktemp constraints.XXXXXX)
trap 'rm -f "$new"' EXIT
{
    cat <<'HEADER'
# Every package of the tested installation. Regenerate with `make lock`, from an environment whose tests are green.
# Names and versions only: where packages come from is up to the settings of pip or uv.
HEADER
    "$VENV/bin/python" - <<'PYTHON'
from importlib.metadata import distributions
import re

OWN = {"sglang-prfaas", "pip", "uv"}
found = {}
for package in distributions():
    name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
    if name not in OWN:
        found[name] = package.version.partition("+")[0]
for name in sorted(found):
    print(f"{name}=={found[name]}")
PYTHON
} >"$new"
chmod 644 "$new"
mv "$new" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) packages" >&2
