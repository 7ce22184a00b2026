"""`launch plan` and `launch simulate`."""

from __future__ import annotations

import importlib.util
import json
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


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_plots_say_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--paper", "--plot", str(tmp_path)]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "best"], "best unknown; there are homogeneous"),
        (["--link", "10"], "--link 10: needs 2 numbers"),
        (["--kill", "10:9"], "there are 4"),
        (["--rate", "0"], "must be positive"),
    ],
)
def test_wrong_simulations(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--duration", "10", *arguments]) == 2
    assert message in capsys.readouterr().err
