"""What a mover counts, from real transfers to the agent's metrics."""

from __future__ import annotations

import contextlib
import re

import msgspec
import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.monitor.link_channel import LinkReceiver, LinkViews, new_endpoint
from sglang_prfaas.sglang_plugin.link_reports import LinkReports
from sglang_prfaas.site.metrics import render_transfers
from sglang_prfaas.transport.link_estimator import LinkFigures
from tests.transport.relay import FaultyRelay
from tests.transport.rig import CONFIG, PAGES, Pair, some_slots, wait_ended, wait_until, works


def sample(text: str, name: str, **labels: str) -> float:
    """The value of one line."""
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    found = re.search(rf"^{re.escape(name)}\{{{re.escape(inner)}\}} (\S+)$", text, re.MULTILINE)
    assert found, f"no {name}{{{inner}}} in:\n{text}"
    return float(found.group(1))


def test_from_transfers_to_metrics() -> None:
    endpoint = new_endpoint()
    receiver = LinkReceiver(endpoint)
    reports = LinkReports(endpoint, "prfaas", "p/0")
    views = LinkViews(VirtualClock(), configured_bytes_per_s={})
    config = msgspec.structs.replace(CONFIG, codec="shuffle", chunk_bytes=1 << 16, link_sample_interval_s=0.02)
    try:
        with Pair(config=config, report=reports) as pair:
            reports.counts = pair.sender.counts
            for component in pair.source.arrays:
                for buffer in component:
                    buffer[:] = 7
            for room in range(3):
                works(pair, room)
            slots = some_slots(9)
            transfer, item = pair.ready(9, slots)
            pair.sender.send(transfer, PAGES, 0, slots[PAGES][:5])
            pair.receiver.abort(item, "enough")
            wait_ended(transfer)
            pair.sender.release(transfer)
            (session,) = pair.receiver._table.sessions.values()
            for connection in list(session.connections.values())[:2]:
                connection.cut()
            wait_until(lambda: pair.sender.counts("pd").reconnects == 2, "both made anew")
            counts = pair.sender.counts("pd")

            def told() -> LinkCounts | None:
                receiver.drain(views)
                return views.counts().get(("prfaas", "pd", "p/0"))

            wait_until(lambda: told() == counts, "the agent knows")
            assert pair.sender.counts("elsewhere") == LinkCounts()
            text = render_transfers(views.counts())
            here = {"from_site": "prfaas", "to_site": "pd", "mover": "p/0"}
            assert sample(text, "prfaas_transfer_requests_total", **here, result="done") == 3
            assert sample(text, "prfaas_transfer_requests_total", **here, result="failed") == 1
            assert sample(text, "prfaas_transfer_reconnects_total", **here) == 2
            assert sample(text, "prfaas_transfer_sessions", **here, codec="shuffle") == 1
            sent = sample(text, "prfaas_transfer_bytes_total", **here, codec="shuffle")
            wire = sample(text, "prfaas_transfer_wire_bytes_total", **here, codec="shuffle")
            saved = sample(text, "prfaas_transfer_saved_bytes_total", **here, codec="shuffle")
            assert saved == sent - wire > 0.5 * 3 * 20 * 6000, "three requests of 20 pages, all of one byte"
            pair.receiver.close()
            wait_until(lambda: pair.sender.counts("pd").sessions_ended == 1, "end of the session")
            assert pair.sender.counts("pd").reconnects == 2
            assert not any(one.sessions for one in pair.sender.counts("pd").codecs.values())
    finally:
        reports.close()
        receiver.close()


@pytest.mark.parametrize("forgets", [True, False])
def test_movers_that_fall_silent_are_forgotten(forgets: bool) -> None:
    endpoint = new_endpoint()
    receiver, clock = LinkReceiver(endpoint), VirtualClock()
    views = LinkViews(clock, configured_bytes_per_s={}, silent_after_s=5.0)
    reports = LinkReports(endpoint, "prfaas", "p/0")
    reports.counts = lambda site: LinkCounts(done=7)
    try:
        reports("pd", LinkFigures())
        wait_until(lambda: receiver.drain(views), "a report")
        clock.advance(6.0 if forgets else 1.0)
        views.links()
        assert bool(views.counts()) is not forgets
    finally:
        reports.close()
        receiver.close()


def test_corrupt_chunks_and_what_was_sent_again_are_counted() -> None:
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(Pair())
        relay = FaultyRelay(pair.sender.data_port, seed=1)
        stack.callback(relay.close)
        pair.sender._handshake.data_port = relay.port
        works(pair, 0)
        assert pair.sender.counts("pd").corrupt_chunks == 0
        relay.corrupt_rate = 0.2
        for room in range(1, 100):
            works(pair, room)
            counts = pair.sender.counts("pd")
            if counts.corrupt_chunks:
                break
        assert counts.corrupt_chunks > 0
        assert counts.resent_chunks > 0
