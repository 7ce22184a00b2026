"""`launch plan` and `launch simulate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sglang_prfaas.launch.__main__ import main
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.profiles import save_profile

TRACE = Path(__file__).parents[1] / "simulate" / "data" / "trace.jsonl"


def test_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--paper", "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "Lambda_max" in text
    assert "BEYOND" not in text
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["all_within"] is True
    assert found["solutions"]["prfaas"]["t_tokens"] == 19_400
    figures = {(entry["where"], entry["figure"]): entry for entry in found["figures"]}
    assert figures["Table 6, prfaas", "Lambda_max"]["paper"] == 3.24
    assert len(found["table3"]) == 24


def test_plan_from_a_profile_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_profile(paper.PAPER_PROFILE, tmp_path / "p.json")
    (tmp_path / "lengths").write_text("1000\n20000\n30000\n")
    arguments = ["plan", "--profile", str(tmp_path / "p.json"), "--lengths", str(tmp_path / "lengths")]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert "shared roles" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["plans"]["best"]["solution"]["lambda_max"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pd-gpus", "12"], "must be a multiple of 8"),
        (["--pd-hardware", "H100"], "no prefill curve of 'H100'"),
        (["--load", "1.5"], "--load must lie between 0 and 1"),
        (["--link-gbps", "0"], "--link-gbps must be positive"),
        (["--profile", "/none.toml"], "cannot be read"),
        (["--lengths", "/none"], "--lengths /none"),
    ],
)
def test_wrong_plans(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_plots_say_what_they_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "--paper", "--plot", str(tmp_path)]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plan", "--paper", "--plot", str(tmp_path / "plan")]) == 0
    arguments = ["--rate", "1", "--duration", "60", "--policies", "static,live", "--link", "20:5"]
    assert main(["simulate", *arguments, "--plot", str(tmp_path / "runs")]) == 0
    found = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert set(found) == {"plan/figure_5a.png", "plan/figure_5b.png", "runs/static.png", "runs/live.png"}
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in found.values())


def test_simulate_a_trace_with_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--trace", str(TRACE), "--policies", "static,live", "--link", "60:10", "--link", "120:100"]
    arguments += [
        "--kill",
        "80:2",
        "--revive",
        "100:2",
        "--burst",
        "30:20:3",
        "--time-scale",
        "1.5",
        "--json",
        str(out),
    ]
    assert main(["simulate", *arguments]) == 0
    assert "live" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found["policies"]) == {"static", "live"}
    columns = found["over_time"]["live"]
    assert len({len(column) for column in columns.values()}) == 1
    assert min(columns["prfaas_alive"]) == 2
    assert {10.0, 100.0} <= set(columns["link_gbps"])


def test_simulate_role_changes_and_a_link_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, link = tmp_path / "out.json", tmp_path / "link"
    link.write_text("# seconds Gbps\n0 100\n100, 20\n")
    arguments = ["--policies", "live", "--rate", "2.2", "--duration", "600", "--output-tokens", "3000", "--n-p", "4"]
    arguments += ["--roles", "--fetch", "--link-trace", str(link), "--kill-decode", "500:1", "--loss", "550:0.001"]
    assert main(["simulate", *arguments, "--json", str(out)]) == 0
    assert "to decode, done" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["role_changes"]["live"][0]["role"] == "decode"
    assert {3, 4} <= set(found["over_time"]["live"]["prefill_servers"])
    assert found["policies"]["live"]["broken"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--link-trace", "/none"], "cannot be read"),
        (["--loss", "10:1.5"], "must be a share below 1"),
        (["--ttft-slo", "-1"], "must be positive"),
        (["--policies", "best"], "best unknown; there are homogeneous"),
        (["--link", "10"], "--link 10: needs 2 numbers"),
        (["--kill", "10:9"], "there are 4"),
        (["--rate", "0"], "must be positive"),
    ],
)
def test_wrong_simulations(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--duration", "10", *arguments]) == 2
    assert message in capsys.readouterr().err
