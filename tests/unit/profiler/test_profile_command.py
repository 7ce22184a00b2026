"""`launch profile` against fake servers on real sockets, whose times follow a law."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.config.load import load_router
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.launch.__main__ import main
from sglang_prfaas.router.profile import router_profile
from sglang_prfaas.scheduler.profiles import ProfileFile, load_profile

from .fakes import BYTES_PER_TOKEN, STATE_BYTES, VOCABULARY, Fake, serving, write_config


def law(tokens: int) -> float:
    """Seconds of a prefill: 70 to 220 ms over most lengths of these tests."""
    return 0.04 + 5e-5 * tokens + 2e-8 * tokens * tokens


def assert_near(found: float, expected: float) -> None:
    """Never quicker than the law, and not much slower: the machine may be busy."""
    assert 0.95 * expected <= found <= 1.5 * expected


def flags(folder: Path, **values: Any) -> list[str]:
    """Quick settings; keyword arguments are further flags."""
    usual = {
        "lengths": "500,1000,2000",
        "batches": "1,4",
        "contexts": "300",
        "window": 8,
        "repeats": 3,
        "budget-s": 60,
        "out": folder / "profile.json",
        "model-config": write_config(folder),
    }
    merged = usual | {name.replace("_", "-"): value for name, value in values.items()}
    return [text for name, value in merged.items() for text in (f"--{name}", str(value))]


def profile(folder: Path, *servers: str, **values: Any) -> ProfileFile:
    assert main(["profile", *servers, *flags(folder, **values)]) == 0
    return load_profile(folder / "profile.json")


def router_file(folder: Path, far: Fake, near: Fake, decode: Fake) -> Path:
    path = folder / "router.toml"
    path.write_text(f"""
[router]
model = "owner/tiny"

[[sites]]
name = "far"
role = "prfaas"
hardware = "H200"
servers = [{{ name = "p", role = "prefill", url = "{far.url}", bootstrap_port = 9001 }}]
links = [{{ to_site = "home", capacity_gbps = 1.0 }}]

[[sites]]
name = "home"
role = "pd"
hardware = "H20"
servers = [
  {{ name = "l", role = "prefill", url = "{near.url}", bootstrap_port = 9002 }},
  {{ name = "d", role = "decode", url = "{decode.url}" }},
]
""")
    return path


def test_a_plain_server_follows_its_law(tmp_path: Path) -> None:
    with serving("plain") as (server,):
        server.prefill_s = law
        server.step_s = lambda batch: 0.03 + 0.01 * batch
        found = profile(tmp_path, "--prefill", f"A={server.url}", "--decode", f"A={server.url}")
        prompts = {tuple(prompt[:32]) for prompt in server.prompts}
        assert len(prompts) == len(server.prompts), "every prompt is new"
        assert max(max(prompt) for prompt in server.prompts) < VOCABULARY
        assert server.most_running == 4
    curve = found.prefill["A"]
    assert [point.x for point in curve.points] == [500, 1000, 2000]
    assert all(point.repeats + point.outliers >= 3 for point in curve.points)
    for tokens in (500, 1000, 1500, 2000):
        assert_near(curve.time_s.at(tokens), law(tokens))
    steps = found.decode["A"].step_s
    assert_near(steps.at(1), 0.04)
    assert_near(steps.at(4), 0.07)
    assert curve.gpus == 4
    assert found.measured is not None
    assert found.measured.command.startswith("python -m sglang_prfaas.launch")
    assert found.measured.servers["A/prefill"] == "prefill of A, SGLang 0.5.23, 4 GPUs or ranks"


def test_the_servers_own_clock_counts_where_it_has_one(tmp_path: Path) -> None:
    with serving("plain") as (server,):
        server.prefill_s, server.own_clock = law, True
        found = profile(tmp_path, "--prefill", f"A={server.url}", lengths="100,1000,4000,16000", repeats=2)
    curve = found.prefill["A"].time_s
    assert curve.interpolation == "quadratic"
    assert curve.at(8000) == pytest.approx(law(8000), rel=0.01)
    assert found.decode == {}


def test_two_sites_with_a_pd_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("prefill", "prefill", "decode") as (far, near, decode):
        far.prefill_s, near.prefill_s = law, lambda tokens: 3 * law(tokens)
        far.own_clock = near.own_clock = True
        decode.step_s = lambda batch: 0.02 + 0.005 * batch
        decode.log = str(tmp_path / "transfers.jsonl")
        decode.transfer_bytes_per_s = 25e6
        router = router_file(tmp_path, far, near, decode)
        found = profile(tmp_path, str(router), transfer_log=decode.log, json=tmp_path / "raw.json")
    assert found.prefill["H20"].time_s.at(1000) == pytest.approx(3 * found.prefill["H200"].time_s.at(1000), rel=0.01)
    assert_near(found.decode["H20"].step_s.at(4), 0.04)
    assert found.kv.full_bytes_per_token == pytest.approx(BYTES_PER_TOKEN, rel=0.01)
    assert found.kv.state_bytes == pytest.approx(STATE_BYTES, rel=0.01)
    assert found.measured is not None
    assert "config.json gives 1000 B/token and 0 B of state" in found.measured.kv_origin
    (link,) = found.measured.links
    assert (link.from_site, link.to_site) == ("far", "home")
    assert 0.2 * 0.99 <= link.gbps <= 4 * 0.2 * 1.01, "the fakes do not share a link"
    assert link.transfers >= 9 + 4, "three lengths three times, and at least once four at a time"
    assert 0 < link.rtt_ms < 1000
    text = capsys.readouterr().out
    assert "link far to home: " in text
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert len(raw["prefill_samples"]["H200"]["1000"]) == 3
    _works_everywhere(tmp_path, router, capsys)


def _works_everywhere(tmp_path: Path, router: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file serves plan, simulate, and a router's live policy."""
    fleet = ["--profile", str(tmp_path / "profile.json"), "--prfaas-hardware", "H200", "--pd-hardware", "H20"]
    fleet += ["--prfaas-gpus", "4", "--pd-gpus", "12", "--lognormal", "6.5", "0.6", "100", "4000", "--slo", "5"]
    assert main(["plan", *fleet]) == 0
    assert "measured on far/p, SGLang 0.5.23" in capsys.readouterr().out
    assert main(["simulate", *fleet, "--policies", "live", "--duration", "60", "--output-tokens", "64"]) == 0
    assert "live" in capsys.readouterr().out
    router.write_text(router.read_text() + f'\n[policy]\nprofile = "{tmp_path / "profile.json"}"\n')
    assert main(["check", "--quiet", str(router)]) == 0
    config = load_router(router)
    assert config.policy.is_live
    assert router_profile(config) == load_profile(tmp_path / "profile.json")


def test_the_layout_of_the_config_stands_where_the_bytes_agree(tmp_path: Path) -> None:
    with serving("prefill", "decode") as (prefill, decode):
        prefill.own_clock = True
        prefill.prefill_s, decode.log = law, str(tmp_path / "log")
        config = write_config(tmp_path, num_key_value_heads=1)
        servers = ["--prefill", f"A={prefill.url}", "--decode", f"A={decode.url}"]
        # 50 KB of state are within 2 % of what 60,000 tokens move.
        prefill.max_tokens = decode.max_tokens = 70_000
        found = profile(tmp_path, *servers, lengths="60000", transfer_log=decode.log, model_config=config)
    assert found.kv == KvLayout(full_bytes_per_token=1000)


def test_a_length_that_is_refused_ends_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("plain") as (server,):
        server.own_clock, server.prefill_s, server.refuse_above = True, law, 1500
        found = profile(tmp_path, "--prefill", f"A={server.url}", lengths="500,1000,2000,4000")
    assert [point.x for point in found.prefill["A"].points] == [500, 1000]
    assert found.measured is not None
    assert "2000 tokens are refused" in found.measured.notes[0]
    assert "longer than the model's context length" in capsys.readouterr().out


def test_lengths_are_those_that_the_server_takes(tmp_path: Path) -> None:
    with serving("plain") as (server,):
        server.own_clock, server.prefill_s, server.max_tokens = True, law, 3008
        arguments = flags(tmp_path)
        del arguments[:2]  # no --lengths
        assert main(["profile", "--prefill", f"A={server.url}", *arguments]) == 0
    points = load_profile(tmp_path / "profile.json").prefill["A"].points
    assert [point.x for point in points] == [512, 1024, 2048, 3000]


def test_a_batch_that_never_runs_at_once_ends_the_batches(tmp_path: Path) -> None:
    with serving("plain") as (server,):
        server.own_clock, server.prefill_s, server.max_running = True, law, 8
        server.step_s = lambda batch: 0.005
        server.max_tokens = 3000  # of 4 streams, each may have 449 tokens after its 300
        found = profile(tmp_path, "--prefill", f"A={server.url}", "--decode", f"A={server.url}", batches="1,2,16")
    assert [point.x for point in found.decode["A"].points] == [1, 2]
    assert found.measured is not None
    assert any("16 streams of 300 tokens do not fit into 3000" in note for note in found.measured.notes)


def test_streams_that_queue_are_no_batch(tmp_path: Path) -> None:
    with serving("plain") as (server,):
        server.own_clock, server.prefill_s, server.max_running = True, law, 2
        server.step_s = lambda batch: 0.002
        server.max_tokens = 4000
        found = profile(tmp_path, "--prefill", f"A={server.url}", "--decode", f"A={server.url}", batches="1,2,4")
        assert server.most_running <= 2
    assert [point.x for point in found.decode["A"].points] == [1, 2]
    assert found.measured is not None
    assert any("does not run 4 streams of 300 tokens at once" in note for note in found.measured.notes)


def test_the_time_is_bounded(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with serving("plain") as (server,):
        server.prefill_s = lambda tokens: 1e-3 * tokens
        found = profile(tmp_path, "--prefill", f"A={server.url}", lengths="100,1000,60000", budget_s=3, repeats=50)
    assert time.monotonic() - started_s < 30
    assert [point.x for point in found.prefill["A"].points][:1] == [100]
    assert 60_000 not in [point.x for point in found.prefill["A"].points]
    assert found.measured is not None
    assert "no time left" in found.measured.notes[-1]


def _fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], *servers: str, **values: Any) -> tuple[int, str]:
    status = main(["profile", *servers, *flags(tmp_path, **values)])
    assert not (tmp_path / "profile.json").exists()
    return status, capsys.readouterr().err


def test_a_server_that_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("plain") as (server,):
        url = server.url
    status, text = _fails(tmp_path, capsys, "--prefill", f"A={url}")
    assert status == 1
    assert "A/prefill (prefill): no connection" in text
    assert "start it, or leave it out" in text


def test_a_server_in_another_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("decode") as (server,):
        status, text = _fails(tmp_path, capsys, "--prefill", f"A={server.url}")
    assert status == 1
    assert "is a decode server, expected prefill; give it with --decode" in text


@pytest.mark.parametrize("what", ["architecture", "model_name"])
def test_sites_that_serve_different_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    with serving("prefill", "prefill") as (one, two):
        setattr(two, what, "another")
        status, text = _fails(tmp_path, capsys, "--prefill", f"A={one.url}", "--prefill", f"B={two.url}")
    assert status == 1
    assert f"A/prefill and B/prefill serve different models: {what}" in text


def test_the_same_model_in_different_places(tmp_path: Path) -> None:
    with serving("prefill", "prefill") as (one, two):
        one.own_clock = two.own_clock = True
        one.prefill_s = two.prefill_s = law
        one.model_name, two.model_name = "/models/tiny", "/mnt/tiny"
        found = profile(tmp_path, "--prefill", f"A={one.url}", "--prefill", f"B={two.url}")
    assert set(found.prefill) == {"A", "B"}


def test_prompts_that_were_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("plain") as (server,):
        server.own_clock, server.prefill_s, server.cached_tokens = True, law, 400
        status, text = _fails(tmp_path, capsys, "--prefill", f"A={server.url}")
    assert status == 1
    assert "400 of 500 random tokens were cached" in text


def test_a_busy_server(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_prfaas.profiler.run._IDLE_S", 0.5)
    monkeypatch.setattr("sglang_prfaas.profiler.decode._SHARED_IDLE_S", 0.1)
    with serving("plain") as (server,):
        server.own_clock, server.prefill_s, server.foreign_requests = True, law, 3
        status, text = _fails(tmp_path, capsys, "--prefill", f"A={server.url}")
        assert status == 1
        assert "A/prefill has requests in work: take it out of service, or give --allow-busy" in text
        server.step_s = lambda batch: 0.005
        servers = ["--prefill", f"A={server.url}", "--decode", f"A={server.url}"]
        found = profile(tmp_path, *servers, "--allow-busy", batches="1", repeats=2)
        assert found.decode["A"].points[0].x == 1
    assert found.measured is not None
    assert found.measured.notes[0] == "A/prefill had other requests in work"


def test_decode_needs_a_prefill_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("decode") as (server,):
        status, text = _fails(tmp_path, capsys, "--decode", f"A={server.url}")
    assert status == 2
    assert "A/decode needs a prefill server to have KVCache from: give one with --prefill" in text


def test_a_log_of_other_servers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_prfaas.profiler.transfers._LOG_S", 0.5)
    with serving("prefill", "decode") as (prefill, decode):
        prefill.own_clock, prefill.prefill_s = True, law
        servers = ("--prefill", f"A={prefill.url}", "--decode", f"A={decode.url}")
        status, text = _fails(tmp_path, capsys, *servers, transfer_log=tmp_path / "none")
    assert status == 1
    assert "says nothing of a transfer that is over; it must be the file that the decode servers'" in text


def test_an_unknown_model_without_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("plain") as (server,):
        config = tmp_path / "unknown.json"
        config.write_text('{"model_type": "unheard of"}')
        status, text = _fails(tmp_path, capsys, "--prefill", f"A={server.url}", model_config=config)
    assert status == 2
    assert "S_kv(l) cannot be known: config.json does not say which layers keep what" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no servers to profile: give the router's FILE"),
        (["--prefill", "H200"], "--prefill H200: must be NAME=URL"),
        (["--prefill", "A=http://127.0.0.1:1", "--out", "x.toml"], "let its name end with .json"),
        (["--prefill", "A=http://127.0.0.1:1", "--out", "/none/x.json"], "no directory that can be written to"),
        (["--prefill", "A=http://127.0.0.1:1", "--lengths", "1,x"], "--lengths 1,x: must be whole numbers"),
        (["--prefill", "A=http://127.0.0.1:1", "--gpus", "A"], "--gpus A: must be NAME=N"),
        (["--prefill", "A=http://127.0.0.1:1", "--hardware", "B=x"], "there is no such site, only A"),
        (["--prefill", "A=http://127.0.0.1:1", "--header", "x"], "--header: must be NAME:VALUE"),
        (["--prefill", "A=http://127.0.0.1:1", "--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--prefill", "A=http://127.0.0.1:1", "--min-tokens", "9", "--max-tokens", "8"], "not above --max-tokens"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    with serving("plain") as (server,):
        server.prefill_s = lambda tokens: 60.0
        command = [sys.executable, "-m", "sglang_prfaas.launch", "profile", "--prefill", f"A={server.url}"]
        process = subprocess.Popen(
            [*command, *flags(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        deadline_s = time.monotonic() + 60
        while not server.prompts and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert server.prompts, "it never sent a prompt"
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; nothing was written" in text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
