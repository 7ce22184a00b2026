"""Requests of a mover that wait for room on their link, and what is known of the link, over real sockets."""

from __future__ import annotations

import threading

import msgspec

from sglang_prfaas.config.schema import LinkConfig
from tests.transport.rig import CONFIG, PAGES, Pair, assert_moved, layout, some_slots, wait_ended, wait_until

LINK = LinkConfig(to_site="pd", capacity_gbps=0.001, rtt_ms=20)


def test_more_than_the_limit_waits_and_is_let_in_as_the_first_arrives() -> None:
    slots = some_slots(1)
    one = layout().request_bytes(tuple(len(values) for values in slots))
    config = msgspec.structs.replace(CONFIG, max_link_inflight_bytes=one)
    with Pair(config=config) as pair:
        pair.session()
        wait_until(lambda: pair.sender.links.admission("pd").limit_bytes == one, "the limit")
        first, _ = pair.ready(1, slots)
        other = pair.receiver.expect(pair.session(), 2, slots, 0)
        second = pair.sender.transfer(2)
        wait_until(lambda: second.expected, "decode asked for the room")
        assert not second.admitted
        pair.send_all(first, slots)
        wait_ended(first)
        assert second.admitted
        with second.lock:
            second.start(len(slots[PAGES]))
        pair.send_all(second, slots)
        wait_ended(second, other.transfer)
        assert_moved(pair.source, slots, pair.target, slots)
        assert pair.sender.links.admission("pd").inflight_bytes == 0


def test_the_limit_follows_the_configured_link() -> None:
    with Pair(links={"pd": LINK}) as pair:
        pair.session()
        wait_until(lambda: pair.sender.links.figures("pd"), "a look")
        wait_until(lambda: pair.sender.links.admission("pd").limit_bytes, "the limit")
        assert pair.sender.links.admission("pd").limit_bytes >= 1_000_000 / 8 * 10


def test_backlog_and_connections_are_reported() -> None:
    seen = []
    slots = some_slots(1)
    with Pair(report=lambda site, figures: seen.append((site, figures))) as pair:
        transfer, item = pair.ready(1, slots)
        blocked = pair.layout.components[PAGES].item_bytes
        release = threading.Event()
        pair.sender.send(transfer, PAGES, 0, slots[PAGES], lambda: wait_until(release.is_set, "the release"))
        expected = len(slots[PAGES]) * sum(blocked)
        wait_until(lambda: seen and seen[-1][1].backlog_bytes == expected, "the backlog")
        assert seen[-1][0] == "pd"
        assert seen[-1][1].connections == CONFIG.connections
        release.set()
        wait_until(lambda: transfer.acknowledged_bytes == expected, "the pages acknowledged")
        wait_until(lambda: seen[-1][1].backlog_bytes == 0, "no backlog")
        wait_until(lambda: seen[-1][1].used_bytes_per_s == 0, "no traffic")
        assert item.transfer.live
