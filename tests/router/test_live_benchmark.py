"""The benchmark of the router in real time, on half a minute of arrivals in a second and a half."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.scheduler import live

RATE, SECONDS, SPEED = 2.0, 30.0, 20.0
LINE = re.compile(r"(off|ordered): (ttft_\w+_s) (\d+\.\d\d) s live, ([+-]\d+\.\d)% to simulated")


def test_both_orders_are_measured_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How close the two come depends on how busy the machine is; that both serve the same requests does not."""
    out = tmp_path / "live.json"
    flags = {"--json": out, "--rate": RATE, "--seconds": SECONDS, "--speed": SPEED}
    monkeypatch.setattr("sys.argv", ["live", *(str(word) for item in flags.items() for word in item)])
    assert live.main() == 0
    found = json.loads(out.read_text())
    assert (found["rate"], found["seconds"], found["speed"]) == (RATE, SECONDS, SPEED)
    assert found["requests"] > 20
    for order in ("off", "ordered"):
        simulated, real, difference = (found[order][key] for key in ("simulated", "live", "difference"))
        assert simulated["requests"] == found["requests"]
        assert 0 < real["offloaded_share"] < 1
        # What the profile says for a prompt of one token, on the quicker hardware.
        assert real["ttft_p50_s"] > 0.389 / SPEED
        assert real["ttft_p50_s"] <= real["ttft_p90_s"] <= real["ttft_p99_s"]
        assert set(difference) == {"ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s"}
        for key, value in difference.items():
            assert value == pytest.approx(real[key] / simulated[key] - 1)

    said = [LINE.fullmatch(line) for line in capsys.readouterr().err.splitlines()]
    assert len(said) == 8
    for line in said:
        assert line is not None
        order, key, seconds, percent = line.groups()
        assert float(seconds) == pytest.approx(found[order]["live"][key] * SPEED, abs=0.006)
        assert float(percent) == pytest.approx(100 * found[order]["difference"][key], abs=0.06)
