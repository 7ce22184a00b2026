"""The codecs' report: ratio, error and speed of every codec, and no byte that arrives otherwise than it was decoded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 240


def test_every_codec_has_its_ratio_its_error_and_its_time(tmp_path: Path) -> None:
    json = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.transport.codecs", "--quick", "--rounds", "1", "--links", "10"]
    done = subprocess.run(
        [*command, "--json", str(json)], cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = msgspec.json.decode(json.read_bytes())
    assert result["wrong"] == 0
    codecs = {row["codec"]: row for row in result["codecs"]}
    assert set(codecs) == {"fp8", "int8", "shuffle"}
    assert min(codecs["fp8"]["ratio"], codecs["int8"]["ratio"]) > 1.8
    assert codecs["shuffle"]["ratio"] > 1
    assert codecs["shuffle"]["relative_l2"] == codecs["shuffle"]["largest_error"] == 0
    assert 0 < codecs["int8"]["relative_l2"] < codecs["fp8"]["relative_l2"] < 0.05
    rows = {row["codec"]: row for row in result["links"]}
    assert set(rows) == {"raw", *codecs}
    assert all(row["wall_s"] > 0 and row["cpu_s_per_gb"] > 0 for row in rows.values())
