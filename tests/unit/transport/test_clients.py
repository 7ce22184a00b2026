"""Who may stay connected to a bound ZeroMQ socket: every bound, reached and just not."""

from __future__ import annotations

import random
from functools import partial

import pytest

from sglang_prfaas.transport import clients
from sglang_prfaas.transport.clients import BAN_S, BURST_S, LAST_WORDS_S, SILENT_S, Clients, Doomed, source_of

RATE = 100.0


def nobody() -> tuple[str, str]:
    return "", ""


def proven(site: str) -> tuple[str, str]:
    return site, f"key-{site}"


def hear(of: Clients, descriptor: int, now_s: float, nbytes: int = 0, identity: bytes = b"") -> Doomed | bool:
    return of.heard(descriptor, identity or b"D%d" % descriptor, nbytes, now_s, nobody)


def test_a_client_within_its_rate_is_never_doomed() -> None:
    of = Clients(RATE)
    of.accepted(1, ("10.0.0.1", 5), 0.0)
    assert all(hear(of, 1, number / RATE) is True for number in range(int(20 * RATE)))


def test_a_burst_is_served_and_a_flood_is_not() -> None:
    of = Clients(RATE)
    of.accepted(1, ("10.0.0.1", 5), 0.0)
    of.accepted(2, ("10.0.0.1", 6), 0.0)
    assert all(hear(of, 1, 0.0) is True for _ in range(int(RATE * BURST_S)))
    doomed = hear(of, 1, 0.0)
    assert isinstance(doomed, Doomed)
    assert (doomed.descriptor, doomed.identity, doomed.who) == (1, b"D1", "10.0.0.1")
    assert doomed.reason == "it sent too many messages, 100 a second are allowed"
    assert hear(of, 1, 60.0) is False
    assert hear(of, 2, 0.0, identity=b"D2") is not True, "its address may open no other connection for a while"
    of.accepted(3, ("10.0.0.2", 7), 0.0)
    assert hear(of, 3, 0.0) is True
    of.accepted(4, ("10.0.0.1", 8), BAN_S + 1)
    assert hear(of, 4, BAN_S + 1) is True


def test_those_that_have_spoken_do_not_pay_for_their_neighbour() -> None:
    of = Clients(RATE)
    for descriptor in (1, 2):
        of.accepted(descriptor, ("10.0.0.1", descriptor), 0.0)
        assert hear(of, descriptor, 0.0) is True
    while hear(of, 1, 0.0) is True:
        pass
    assert hear(of, 2, 0.0) is True


def test_large_messages_count_for_more() -> None:
    of = Clients(RATE)
    of.accepted(1, ("10.0.0.1", 5), 0.0)
    count = 0
    while hear(of, 1, 0.0, nbytes=64 << 10) is True:
        count += 1
    assert count == int(RATE * BURST_S) // 65


def test_the_doomed_are_cut_after_their_last_words() -> None:
    of = Clients(1.0)
    of.accepted(1, ("10.0.0.1", 5), 0.0)
    while hear(of, 1, 0.0) is True:
        pass
    assert of.tick(LAST_WORDS_S / 2) == ([], [])
    assert of.tick(LAST_WORDS_S) == ([], [1])
    of.gone(1)
    assert of.tick(LAST_WORDS_S) == ([], [])
    assert len(of) == 0


def test_whoever_says_nothing_is_cut() -> None:
    of = Clients(RATE)
    of.accepted(1, ("10.0.0.1", 5), 0.0)
    of.accepted(2, ("10.0.0.1", 6), 0.0)
    hear(of, 2, 1.0)
    silent, _ = of.tick(SILENT_S + 0.1)
    assert [(doomed.descriptor, doomed.reason) for doomed in silent] == [(1, f"it has said nothing for {SILENT_S:g} s")]
    assert of.tick(SILENT_S + 0.1)[0] == []


def test_a_source_cannot_crowd_others_out() -> None:
    of = Clients(RATE)
    of.accepted(0, ("10.0.0.1", 1), 0.0)
    doomed = [of.accepted(number, ("10.0.0.66", number), 0.0) for number in range(1, 1000)]
    cut = [one.descriptor for one in doomed if one is not None]
    assert cut == list(range(1, 1000 - clients.MAX_SOURCE_SILENT)), "the oldest of that address, one for each new one"
    for number in range(2000, 2000 + 500):
        one = of.accepted(number, (f"10.0.1.{number % 250}", number), 0.0)
        assert one is None or one.who == "10.0.0.66" or one.who.startswith("10.0.1.")
    assert hear(of, 0, 0.0) is True


def test_many_that_have_spoken_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_SOURCE_CLIENTS", 3)
    of = Clients(RATE)
    for descriptor in range(3):
        assert of.accepted(descriptor, ("10.0.0.1", descriptor), 0.0) is None
        hear(of, descriptor, 0.0)
    doomed = of.accepted(3, ("10.0.0.1", 3), 0.0)
    assert doomed is not None
    assert doomed.descriptor == 3
    assert of.accepted(4, ("10.0.0.2", 3), 0.0) is None


def test_a_list_that_has_changed() -> None:
    of = Clients(RATE)
    for descriptor, site in enumerate(("pd", "third", "")):
        of.accepted(descriptor, ("10.0.0.1", descriptor), 0.0)
        if site:
            of.heard(descriptor, b"D", 0, 0.0, partial(proven, site))
    doomed = {one.descriptor: one.reason for one in of.unlisted(lambda site, key: (site, key) == ("pd", "key-pd"), 1.0)}
    assert doomed == {1: "its key key-third is not in peers.toml any more", 2: "it has to prove its site again"}
    assert of.heard(0, b"D", 0, 1.0, nobody) is True


def test_a_descriptor_used_again_before_its_end_was_told() -> None:
    of = Clients(RATE)
    of.accepted(1, ("10.0.0.1", 5), 0.0)
    of.heard(1, b"one", 0, 0.0, lambda: ("pd", "key"))
    assert of.heard(1, b"other", 0, 0.0, lambda: ("third", "key-3")) is True
    doomed = of.unlisted(lambda site, key: site != "third", 0.0)
    assert [one.identity for one in doomed] == [b"other"]


def test_counters_come_back_to_nothing() -> None:
    rng = random.Random(1)
    of = Clients(5.0)
    now_s = 0.0
    for _ in range(5000):
        now_s += rng.random() * 0.05
        descriptor = rng.randrange(400)
        match rng.randrange(4):
            case 0:
                of.accepted(descriptor, (f"10.0.0.{rng.randrange(3)}", rng.randrange(9)), now_s)
            case 1:
                of.gone(descriptor)
            case 2:
                hear(of, descriptor, now_s)
            case 3:
                for due in of.tick(now_s)[1]:
                    of.gone(due)
    for descriptor in range(400):
        of.gone(descriptor)
    assert len(of) == len(of._silent) == len(of._doomed) == len(of._sources) == len(of._silent_sources) == 0


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("an unknown address", "an unknown address"),
    ],
)
def test_sources(host: str, source: str) -> None:
    assert source_of(host) == source
