"""Filters, events, metrics, logprob merging, log lines."""

from __future__ import annotations

import asyncio
import errno
import io
import json

import pytest

from sglang_prfaas.http import HttpError, Request
from sglang_prfaas.router.access_log import AccessLog, AccessRecord
from sglang_prfaas.router.filters import check_method, check_passthrough, forced_route
from sglang_prfaas.router.logprobs import StreamMerger, merge_answers
from sglang_prfaas.router.metrics import Counter, Histogram, Metrics
from sglang_prfaas.router.sse import error_event, event_failure, first_event


def request(method: str = "POST", target: bytes = b"/generate", **headers: str) -> Request:
    return Request(method, target, [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()])


def test_methods() -> None:
    check_method(request())
    check_method(request("PUT"))
    check_method(request("DELETE", b"/anything"))
    with pytest.raises(HttpError) as caught:
        check_method(request("GET"))
    assert caught.value.status == 405
    assert caught.value.headers == ((b"allow", b"POST, PUT"),)


@pytest.mark.parametrize("path", ["/flush_cache", "/flush_cache/", "//slow_down", "/hicache/x", "/dumper/configure"])
def test_admin_endpoints_are_refused_unless_allowed(path: str) -> None:
    with pytest.raises(HttpError) as caught:
        check_passthrough(path, allow_admin=False)
    assert caught.value.status == 403
    check_passthrough(path, allow_admin=True)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/server_info", "/", "/x/flush_cache"])
def test_other_endpoints_pass(path: str) -> None:
    check_passthrough(path, allow_admin=False)


@pytest.mark.parametrize("path", ["/a/../flush_cache", "/./flush_cache", "*", "x:443"])
def test_paths_that_could_hide_one_are_refused(path: str) -> None:
    with pytest.raises(HttpError) as caught:
        check_passthrough(path, allow_admin=True)
    assert caught.value.status == 400


def test_a_percent_encoded_path_is_seen_through() -> None:
    assert request(target=b"/%66lush_cache?x=%20").path == "/flush_cache"


def test_forced_route() -> None:
    assert forced_route(request()) is None
    assert forced_route(request(x_prfaas_route=" Local ")) == "local"
    assert forced_route(request(x_prfaas_route="prfaas")) == "prfaas"
    with pytest.raises(HttpError, match="must be local or prfaas, got 'x'"):
        forced_route(request(x_prfaas_route="x"))


@pytest.mark.parametrize(
    ("event", "failure"),
    [
        (b'{"choices": []}', None),
        (b"[DONE]", None),
        (b'{"text": "an \\"error\\" or \\"abort\\""}', None),
        (b'{"error": {"message": "m", "code": 503}}', (503, "m")),
        (b'{"error": {"message": "m", "code": "BadRequest"}}', (500, "m")),
        (b'{"object": "error", "message": "m", "code": 400, "x": "error"}', (400, "m")),
        (b'{"meta_info": {"finish_reason": {"type": "abort", "message": "m", "status_code": 500}}}', (500, "m")),
        (b'{"meta_info": {"finish_reason": {"type": "abort", "message": "m", "status_code": null}}}', None),
        (b'{"error": ', None),
    ],
)
def test_event_failures(event: bytes, failure: tuple[int, str] | None) -> None:
    assert event_failure(event) == failure


def test_first_event_waits_for_the_whole_event() -> None:
    event = error_event("broken", "upstream_failed")
    for cut in range(len(event)):
        assert first_event(event[:cut]) is None
    payload = first_event(b": comment\n\n" + event + b"data: next")
    assert payload is not None
    assert json.loads(payload)["error"]["message"] == "broken"
    assert event_failure(payload) == (500, "broken")


def test_counters_and_histograms_in_prometheus_text() -> None:
    counter = Counter("c_total", "Help.", ("a",))
    counter.add(('x"\\\n',))
    counter.add(('x"\\\n',), 2)
    assert list(counter.lines()) == ["# HELP c_total Help.", "# TYPE c_total counter", 'c_total{a="x\\"\\\\\\n"} 3']
    histogram = Histogram("h", "Help.", (), (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe((), value)
    assert list(histogram.lines())[2:] == [
        'h_bucket{le="1.0"} 2',
        'h_bucket{le="2.0"} 3',
        'h_bucket{le="+Inf"} 4',
        "h_sum 12",
        "h_count 4",
    ]
    text = Metrics().render([("up", "Up.", ("s",), [(("a",), 1.0)])]).decode()
    assert text.endswith('# HELP up Up.\n# TYPE up gauge\nup{s="a"} 1\n')


def answer(tokens: list[int], **more: object) -> bytes:
    return json.dumps({"meta_info": {"input_token_logprobs": tokens}, "text": "é", **more}).encode()


def test_logprobs_of_one_answer_and_of_a_batch() -> None:
    assert json.loads(merge_answers(answer([1, 2]), answer([3])))["meta_info"]["input_token_logprobs"] == [1, 2, 3]
    one, two = (b"[%b, %b]" % (answer([n]), answer([n + 1])) for n in (1, 10))
    merged = json.loads(merge_answers(one, two))
    assert [item["meta_info"]["input_token_logprobs"] for item in merged] == [[1, 10], [2, 11]]


@pytest.mark.parametrize("prefill", [b"", b"[]", b"{}", answer([]), b'{"meta_info": 3}'])
def test_where_prefill_has_nothing_decodes_bytes_stay(prefill: bytes) -> None:
    assert merge_answers(prefill, answer([3])) == answer([3])


def test_stream_merging_by_index_at_any_cut() -> None:
    merger = StreamMerger()
    merger.add_prefill(
        b"data: " + answer([1], index=0) + b"\n\ndata: " + answer([2], index=1) + b"\n\ndata: [DONE]\n\n"
    )
    stream = b"data: " + answer([], index=1) + b"\n\ndata: " + answer([9], index=0) + b"\n\ndata: [DONE]\n\n"
    out = b"".join(merger.feed(stream[i : i + 1]) for i in range(len(stream))) + merger.rest()
    first, second, done, rest = out.split(b"\n\n")
    assert json.loads(first[6:])["meta_info"]["input_token_logprobs"] == [2]
    assert json.loads(second[6:])["meta_info"]["input_token_logprobs"] == [1, 9]
    assert (done, rest) == (b"data: [DONE]", b"")


def test_a_log_line_is_one_json_object() -> None:
    async def main() -> str:
        stream = io.StringIO()
        log = AccessLog(stream)
        record = AccessRecord(request(), 'a"\n', "generate", 1.0)
        record.error = "line\nbreak"
        record.status = 400
        log.write(record, 1.5, 0.25)
        log.flush()
        return stream.getvalue()

    text = asyncio.run(main())
    assert text.count("\n") == 1
    line = json.loads(text)
    assert line["id"] == 'a"\n'
    assert line["total_ms"] == 500.0
    assert line["time"] == "1970-01-01T00:00:00.250Z"
    assert line["route"] == "none"


def test_a_log_that_cannot_be_written_costs_lines_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> int:
        log = AccessLog(Full())
        for _ in range(600):
            log.write(AccessRecord(request(), "a", "generate", 1.0), 1.5, 0.25)
        log.flush()
        return log.lost_lines

    assert asyncio.run(main()) == 600
    assert [record.message for record in caplog.records] == [
        "the request log cannot be written, requests go on: [Errno 28] No space left on device"
    ]
