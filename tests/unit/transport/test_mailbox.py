"""Numbered control messages over a channel that loses, repeats and corrupts them."""

from __future__ import annotations

import random

import pytest

from sglang_prfaas.errors import ChecksumError, LocalError, ProtocolError
from sglang_prfaas.transport import mailbox
from sglang_prfaas.transport.mailbox import ENVELOPE, RESEND_S, Mailbox, seal, unseal


def deliver(box: Mailbox, data: bytes, now_s: float) -> bytes | None:
    """What the receiver acts on."""
    number, acknowledged, body = unseal(data)
    return body if box.accept(number, acknowledged, now_s) else None


def owing(box: Mailbox) -> bool:
    return box.owing


def test_an_envelope() -> None:
    assert unseal(seal(b"body", 5, 7)) == (5, 7, b"body")
    with pytest.raises(ProtocolError, match=f"3 bytes, its envelope alone has {ENVELOPE.size}"):
        unseal(b"abc")


def test_every_flipped_bit_is_noticed() -> None:
    good = seal(b"body", 5, 7)
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChecksumError):
            unseal(bytes(bad))


def test_a_gap_is_not_acted_on_and_filled_later() -> None:
    ours, theirs = Mailbox(0.0), Mailbox(0.0)
    ours.post(b"one", 0.0)
    assert deliver(theirs, ours.post(b"two", 0.0), 0.0) is None
    assert owing(theirs)
    assert ours.resend(RESEND_S / 2) == []
    again = ours.resend(RESEND_S)
    assert [deliver(theirs, data, 1.0) for data in again] == [b"one", b"two"]
    assert [deliver(theirs, data, 1.0) for data in again] == [None, None]
    deliver(ours, theirs.unnumbered(b"ping"), 1.0)
    assert not owing(theirs)
    assert ours.resend(99.0, at_once=True) == []


def test_an_acknowledgement_of_what_was_never_sent() -> None:
    with pytest.raises(ProtocolError, match="message 1 acknowledged, 0 were sent"):
        Mailbox(0.0).accept(0, 1, 0.0)


def test_a_peer_that_never_acknowledges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "MAX_UNACKNOWLEDGED", 2)
    box = Mailbox(0.0)
    box.post(b"1", 0.0)
    box.post(b"2", 0.0)
    with pytest.raises(LocalError, match="2 control messages were not acknowledged"):
        box.post(b"3", 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_everything_arrives_once_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    ours, theirs = Mailbox(0.0), Mailbox(0.0)
    got: list[bytes] = []
    wire: list[bytes] = []
    for step in range(400):
        now_s = step * 0.25
        if step < 100:
            wire.append(ours.post(b"%d" % step, now_s))
        wire += ours.resend(now_s)
        for data in wire:
            if rng.random() < 0.3:
                continue
            body = deliver(theirs, data, now_s)
            got += [body] if body is not None else []
        wire = []
        if theirs.owing and rng.random() < 0.7:
            deliver(ours, theirs.unnumbered(b""), now_s)
    assert got == [b"%d" % step for step in range(100)]
