"""`launch profile` over real SGLang servers, and the planner on what it wrote."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sglang_prfaas.launch.__main__ import main
from sglang_prfaas.scheduler.profiles import load_profile

from .driving import DECODE, LOCAL, REMOTE, Driver

pytestmark = pytest.mark.sglang
BUDGET_S = 30


def test_a_profile_of_two_sites(cluster: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.wait_idle(REMOTE, LOCAL, DECODE)
    out = tmp_path / "profile.json"
    arguments = [str(cluster.cluster.deployment.router_file), "--hardware", "prfaas=far", "--hardware", "pd=near"]
    arguments += ["--transfer-log", cluster.log_path, "--out", str(out), "--budget-s", str(BUDGET_S)]
    arguments += ["--lengths", "64,256,1024", "--batches", "1,2", "--contexts", "64", "--window", "8", "--repeats", "2"]
    started_s = time.monotonic()
    assert main(["profile", *arguments]) == 0
    text = capsys.readouterr().out
    assert time.monotonic() - started_s < 10 * BUDGET_S, "a busy machine makes it longer, but it ends"

    found = load_profile(out)
    assert set(found.prefill) == {"far", "near"}
    for curve in found.prefill.values():
        times = [point.median_s for point in curve.points]
        assert 0 < times[0] < times[-1], text
    assert found.decode["near"].points[0].x == 1
    measured = found.measured
    assert measured is not None
    # One MLA layer and three KDA layers in float32; config.json is taken for bf16.
    assert found.kv.full_bytes_per_token == pytest.approx((64 + 16) * 4, rel=0.05)
    state = 3 * (4 * 32 * 32 * 4 + 3 * 4 * 32 * 3 * 4)
    assert found.kv.state_bytes == pytest.approx(state, rel=0.1)
    received = {record.bytes for record in cluster.all_records() if record.role == "decode"}
    assert {point.moved_bytes for point in measured.kv} <= received
    (link,) = measured.links
    assert (link.from_site, link.to_site) == ("prfaas", "pd")
    assert link.gbps > 0

    fleet = ["--profile", str(out), "--prfaas-hardware", "far", "--pd-hardware", "near", "--pd-gpus", "4"]
    fleet += ["--prfaas-gpus", "2", "--lognormal", "5.5", "0.5", "64", "1024", "--output-tokens", "32", "--slo", "0.5"]
    assert main(["plan", *fleet, "--link-gbps", f"{link.gbps:.3f}"]) == 0
    assert "PD site alone" in capsys.readouterr().out
    cluster.wait_idle(REMOTE, LOCAL, DECODE)
