"""ZAP answers, what monitors tell, server keys that are tried, and bounded log lines."""

from __future__ import annotations

import logging

import pytest
import zmq
import zmq.utils.z85
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.security import curve
from sglang_prfaas.transport.security.refusals import LINES, WINDOW_S, RefusalLog
from sglang_prfaas.transport.security.server_keys import ROUNDS, ServerKey, ServerKeys

KEY = b"k" * 32
TEXT = zmq.utils.z85.encode(KEY).decode()


def request(*credentials: bytes, mechanism: bytes = b"CURVE", version: bytes = b"1.0") -> list[bytes]:
    return [b"peer", b"", version, b"7", b"prfaas", b"10.2.0.1", b"", mechanism, *credentials]


def answer(frames: list[bytes]) -> tuple[list[bytes] | None, list[str]]:
    """Of a site that lets pd in with KEY; and what it logs."""
    refused: list[str] = []
    return curve.zap_answer(frames, lambda key: "pd" if key == TEXT else "", refused.append), refused


def test_a_known_key_is_let_in_as_its_site() -> None:
    assert answer(request(KEY)) == (
        [b"peer", b"", b"1.0", b"7", b"200", b"", b"pd", b"\x0aPrfaas-Key\0\0\0\x28" + TEXT.encode()],
        [],
    )


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (request(b"x" * 32), f"its key {zmq.utils.z85.encode(b'x' * 32).decode()} is not in peers.toml"),
        (request(mechanism=b"NULL"), "no CURVE key"),
        (request(b"user", b"password", mechanism=b"PLAIN"), "no CURVE key"),
        (request(b"short"), "no CURVE key"),
        (request(), "no CURVE key"),
    ],
)
def test_everybody_else_is_not(frames: list[bytes], why: str) -> None:
    reply, refused = answer(frames)
    assert reply is not None
    assert reply[4] == b"400"
    assert refused == [f"control connection from 10.2.0.1 refused: {why}"]


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_no_request_at_all(frames: list[bytes]) -> None:
    reply = curve.zap_answer(frames, lambda key: "", lambda text: None)
    assert reply is None or b"400" in reply


def test_what_a_monitor_tells_the_side_that_dials() -> None:
    mismatch = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
    for event, value, site, part, refused in (
        (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400, "pd", "does not let this site's key in", True),
        (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, mismatch, "pd", "it works without keys", True),
        (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, mismatch, "", "it demands keys", True),
        (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, 5, "", "handshake broken (0x5)", True),
        (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, 32, "pd", "does not hold the key of site pd", True),
        (zmq.EVENT_DISCONNECTED, 9, "", "it closed the control connection", False),
    ):
        loss = curve.loss(event, value, site)
        assert loss is not None
        assert part in loss.reason
        assert loss.refused is refused
    assert curve.loss(zmq.EVENT_CONNECTED, 0, "") is None


A, B = ServerKey("pd", b"a"), ServerKey("prfaas", b"b")


def test_keys_are_tried_in_turn_until_one_is_right() -> None:
    keys = ServerKeys(lambda host: (A, B) if host == "h" else ())
    assert keys.get("h:1") == A
    assert not keys.refused("h:1", A)
    assert keys.get("h:1") == B
    assert keys.get("h:2") == A, "another server at the same host"
    assert not keys.refused("h:1", A), "another attempt has failed with it already"
    keys.accepted("h:1")
    assert [keys.refused("h:1", keys.get("h:1")) for _ in range(2 * ROUNDS)] == [False] * (2 * ROUNDS - 1) + [True]
    assert not keys.refused("h:1", keys.get("h:1")), "then they are tried anew"
    with pytest.raises(LocalError, match="no site at elsewhere"):
        keys.get("elsewhere:1")


def test_refusals_are_told_once_and_not_without_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualClock()
    log = RefusalLog(logging.getLogger("refusals"), clock)
    for _ in range(5):
        log.warn("from 10.0.0.1")
    assert [record.getMessage() for record in caplog.records] == ["prfaas: from 10.0.0.1"]
    for index in range(LINES + 10):
        log.warn(f"from 10.0.1.{index}")
    assert len(caplog.records) == LINES
    clock.advance(WINDOW_S)
    log.warn("from 10.0.0.1")
    assert caplog.records[-1].getMessage() == "prfaas: from 10.0.0.1 (and 11 more refusals before it)"
