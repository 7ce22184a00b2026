"""What SGLang 0.5.23 said of a prefill and a decode server while they served twelve requests: recorded, and parsed."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.monitor.sglang_loads import Figures, add, parse_load_stat, parse_loads, parse_metrics

RECORDED = Path(__file__).with_name("recorded")


def answers(role: str) -> list[Figures]:
    lines = (RECORDED / f"loads_{role}.jsonl").read_text().splitlines()
    return [parse_loads(json.loads(line)["body"].encode()) for line in lines]


def stats(server: str) -> list[tuple[int, Figures]]:
    lines = map(json.loads, (RECORDED / "load_stats.jsonl").read_text().splitlines())
    return [parse_load_stat([bytes.fromhex(f) for f in line["frames"]]) for line in lines if line["server"] == server]


def test_a_decode_server_tells_its_queues() -> None:
    busiest = max(answers("decode"), key=lambda figures: figures.running + (figures.transferring or 0))
    assert (busiest.role, busiest.running, busiest.transferring, busiest.prealloc) == ("decode", 0, 12, 0)
    assert (busiest.kv_tokens_used, busiest.kv_tokens_total) == (4800, 40960)
    last = answers("decode")[-1]
    assert last.decode_tokens is not None
    assert last.decode_tokens > 600
    assert any(figures.waiting == 2 and figures.running == 8 for figures in answers("decode"))


def test_a_prefill_server_tells_what_waits() -> None:
    queued = max(answers("prefill"), key=lambda figures: figures.waiting)
    assert (queued.role, queued.waiting, queued.waiting_uncached_tokens, queued.transferring) == ("prefill", 8, 3600, 1)
    assert answers("prefill")[4].prealloc == 4
    assert answers("prefill")[-1].prefill_tokens == 4804


def test_load_stats_count_all_queues_as_one() -> None:
    numbers = [number for number, _ in stats("pd-decode-0")]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert max(figures.waiting for _, figures in stats("pd-decode-0")) == 12
    last = stats("pd-prefill-0")[-1][1]
    assert last.prefill_tokens == 4804
    assert last.prefill_busy_s == pytest.approx(2.79103)


def test_metrics_have_the_queues_without_counters() -> None:
    figures = parse_metrics((RECORDED / "metrics_decode.txt").read_bytes())
    assert (figures.running, figures.waiting, figures.transferring) == (8, 3, 0)
    assert figures.kv_tokens_used == 4262
    assert figures.generated_tokens_per_s == pytest.approx(175.994, abs=1e-3)
    assert figures.decode_steps is None
    assert parse_metrics((RECORDED / "metrics_prefill.txt").read_bytes()).running == 0


def test_ranks_are_added_up() -> None:
    one, other = answers("decode")[5], answers("decode")[8]
    both = add([one, other])
    assert both.running == one.running + other.running
    assert both.decode_busy_s == pytest.approx((one.decode_busy_s or 0) + (other.decode_busy_s or 0))
    assert both.written_s == one.written_s
    assert both.ranks == 2
    assert add([one]) is one
    with pytest.raises(ValueError, match="no figures"):
        add([])


def test_tensor_parallel_ranks_of_metrics_are_one_server() -> None:
    text = b"".join(
        b'sglang:num_running_reqs{tp_rank="%d",dp_rank="%d"} 3.0\n' % (t, d) for t in (0, 1) for d in (0, 1)
    )
    assert parse_metrics(text).running == 6


@pytest.mark.parametrize("body", [b"", b"no json", b"{}", b'{"loads":[]}', b'{"loads":7}', b'{"loads":[{"queues":1}]}'])
def test_answers_that_are_none(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="/v1/loads"):
        parse_loads(body)


@pytest.mark.parametrize("text", [b"", b"sglang:num_used_tokens{} 1", b"sglang:num_running_reqs{} many"])
def test_metrics_that_are_none(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="/metrics"):
        parse_metrics(text)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"load", b"12345678"],
        [b"kv", b"12345678", b""],
        [b"load", b"1", b""],
        [b"load", b"12345678", msgspec.msgpack.encode(["LoadStat", 1])],
        [b"load", b"12345678", msgspec.msgpack.encode(["Other", 1, 2, 3, 4])],
    ],
)
def test_load_stats_that_are_none(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match="LoadStat"):
        parse_load_stat(frames)


@pytest.mark.parametrize(("mode", "role"), [("decode", "decode"), ("prefill", "prefill"), ("null", ""), ("cook", "")])
def test_roles(mode: str, role: str) -> None:
    body = b'{"version":"0.5.23","loads":[{"dp_rank":0,"disaggregation":{"mode":"%s","x":1}}]}' % mode.encode()
    assert parse_loads(body).role == role
    assert parse_loads(b'{"loads":[{"disaggregation":null}]}').role == ""
