"""The soak: that it runs, and says so where something grows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.transport.soak import GROWTH_BYTES, GROWTH_COUNT, Sample, grown

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 240


def samples(**last: int) -> list[Sample]:
    """Half a minute in which nothing grows, but for what is said of the last tenth."""
    flat = Sample(0.0, 1.0, 200 << 20, 40, 12, 0)
    return [msgspec.structs.replace(flat, **(last if at >= 27 else {}), at_s=float(at)) for at in range(30)]


def test_what_stays_has_not_grown() -> None:
    assert grown(samples()) == []
    assert grown(samples(rss_bytes=(200 << 20) + GROWTH_BYTES, descriptors=40 + GROWTH_COUNT)) == []


@pytest.mark.parametrize(
    "last",
    [
        {"rss_bytes": (200 << 20) + GROWTH_BYTES + 1},
        {"descriptors": 40 + GROWTH_COUNT + 1},
        {"threads": 12 + GROWTH_COUNT + 1},
    ],
    ids=lambda last: next(iter(last)),
)
def test_each_kind_of_growth_is_named(last: dict[str, int]) -> None:
    assert len(grown(samples(**last))) == 1


def test_some_seconds_of_it(tmp_path: Path) -> None:
    json = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.transport.soak", "--minutes", "0.08", "--reset-every-s", "0.5"]
    done = subprocess.run(
        [*command, "--json", str(json)], cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    result = msgspec.json.decode(json.read_bytes())
    assert done.returncode == int(bool(result["problems"])), done.stdout + done.stderr
    assert all(sample["gb_per_s"] > 0 for sample in result["samples"])
    assert result["samples"][-1]["reconnects"] >= 1
