"""Closing movers while they work, and before they did."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.framing import Preface
from sglang_prfaas.transport.layout import Component
from sglang_prfaas.transport.messages import Expect, Welcome
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import FakeDecode
from tests.transport.rig import DEADLINE_S, Memory, Pair, layout, some_slots, wait_ended, wait_until


@pytest.mark.parametrize("who", ["sender", "receiver", "both"])
def test_closing_while_transfers_run(who: str) -> None:
    with Pair() as pair:
        requests = [(slots, *pair.ready(room, slots)) for room, slots in ((r, some_slots(r)) for r in range(6))]
        threads = [threading.Thread(target=pair.send_all, args=(t, slots, 1)) for slots, t, _ in requests]
        for thread in threads:
            thread.start()
        closers = [
            threading.Thread(target=end.close)
            for name, end in (("sender", pair.sender), ("receiver", pair.receiver))
            if who in (name, "both")
        ]
        for thread in closers:
            thread.start()
        for thread in [*threads, *closers]:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        for _, transfer, item in requests:
            wait_ended(transfer, item.transfer)
            if item.transfer.state is State.FAILED:
                assert item.transfer.reason


def test_closing_while_the_receiver_is_stuck_in_send() -> None:
    of = layout(components=(Component("kv", (1 << 20,)),))
    config = TransportConfig(connections=1, chunk_bytes=1 << 20, socket_buffer_bytes=1 << 16)
    with (
        Pair(of=of, config=config, send_memory=Memory(of, 1, (8,)), receive_memory=Memory(of, None, (8,))) as pair,
        FakeDecode(pair.sender.control_port) as decode,
    ):
        decode.hello(of, 1, 1 << 20)
        welcome = decode.receive(Welcome)
        data = decode.connect(welcome.data_port, Preface(0, welcome.token).pack())
        decode.send(Expect(1, 7, (8,), 0))
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        with transfer.lock:
            transfer.start(8)
        pair.send_all(transfer, [np.arange(8)])
        data.recv(1)
        pair.sender.close()
        assert transfer.reason == "the prefill server stopped"


def test_closing_what_was_never_started() -> None:
    pair = Pair()
    pair.sender.close()
    pair.receiver.close()
    pair.sender.close()
