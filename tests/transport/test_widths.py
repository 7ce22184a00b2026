"""Prefill and decode of different attention TP widths and page sizes, over real sockets: every rank gets exactly its
shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.device_memory import TorchBuffer
from sglang_prfaas.transport.fan_out import FanOut, joint_reason, joint_state
from sglang_prfaas.transport.layout import Component, Layout, Sharding
from sglang_prfaas.transport.memory import HostBuffer, RankMemory
from sglang_prfaas.transport.part_memory import PrefillRank
from sglang_prfaas.transport.receive_mover import Incoming, PeerSession, ReceiveMover
from sglang_prfaas.transport.reshape import held, peers
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.transfer import State

from .rig import CONFIG, wait_until

Items = npt.NDArray[np.uint8]

SLOTS = 24
PAGE_TOKENS = 4
KV = Sharding(2, PAGE_TOKENS, (2,), 24)
LATENT = Sharding(3)
CONV = Sharding(1, 3, (8, 8, 16), 4)
STATE = Sharding(1, 1, (8,), 1000)
AUX = Sharding(2)
COMPONENTS: tuple[tuple[str, tuple[Sharding, ...]], ...] = (
    ("kv", (KV, LATENT)),
    ("mamba", (CONV, STATE)),
    ("aux", (AUX,)),
)
REPLICATED_BYTES = {"kv": 288, "aux": 16}
COUNTS = (9, 1, 1)


def single(name: str) -> list[tuple[str, Sharding]]:
    """One sharding a buffer."""
    shardings = dict(COMPONENTS)[name]
    return [(name, msgspec.structs.replace(s, buffers=1)) for s in shardings for _ in range(s.buffers)]


class Whole:
    """The caches of all ranks together: `[slots, rows, units, unit bytes]` of every section of every buffer."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def section(rows: int, units: int, nbytes: int) -> Items:
            return rng.integers(1, 16, (SLOTS, rows, units, nbytes), dtype=np.uint8)

        self.buffers = [
            [
                [section(s.rows, units, s.unit_bytes) for units in s.sections]
                or [section(1, 1, REPLICATED_BYTES[name])]
                for name, s in single(name)
            ]
            for name, _ in COMPONENTS
        ]

    def of(self, width: int, rank: int, page_tokens: int = PAGE_TOKENS) -> list[list[Items]]:
        """What a rank holds: `[slots, bytes]` of every buffer, full attention in pages of `page_tokens`."""
        pages, *rest = self._in_slots(width, rank)
        return [[array.reshape(SLOTS * PAGE_TOKENS // page_tokens, -1) for array in pages], *rest]

    def _in_slots(self, width: int, rank: int) -> list[list[Items]]:
        return [
            [
                np.ascontiguousarray(
                    np.concatenate(
                        [
                            section[:, :, held(section.shape[2], width, rank)].reshape(SLOTS, section.shape[1], -1)
                            for section in sections
                        ],
                        axis=2,
                    ).reshape(SLOTS, -1)
                )
                for sections in component
            ]
            for component in self.buffers
        ]


def layout(arrays: list[list[Items]], width: int, rank: int, page_tokens: int = PAGE_TOKENS) -> Layout:
    by_name = {**dict(COMPONENTS), "kv": (msgspec.structs.replace(KV, rows=page_tokens), LATENT)}
    components = tuple(
        Component(name, tuple(a.shape[1] for a in buffers), by_name[name])
        for (name, _), buffers in zip(COMPONENTS, arrays, strict=True)
    )
    return Layout("Hybrid-abc", "float16", page_tokens, width, "", (1, 3), components, rank)


def memory(arrays: list[list[Items]], torch_buffers: bool) -> RankMemory:
    def buffer(array: Items) -> Any:
        if not torch_buffers:
            return HostBuffer(array.ctypes.data, array.nbytes, array.shape[1])
        import torch

        return TorchBuffer(torch.from_numpy(array))

    return RankMemory([[buffer(array) for array in buffers] for buffers in arrays])


class Servers:
    """All ranks of a prefill and of a decode server."""

    def __init__(
        self,
        prefill: int,
        decode: int,
        stack: ExitStack,
        config: TransportConfig,
        torch_buffers: bool,
        page_tokens: tuple[int, int],
    ):
        self.widths = prefill, decode
        self.page_tokens = page_tokens
        self.whole = Whole(3)
        clock = MonotonicClock()
        self.senders: list[SendMover] = []
        self.receivers: list[ReceiveMover] = []
        self.sent: list[list[list[Items]]] = []
        self.written: list[list[list[Items]]] = []
        for rank in range(prefill):
            arrays = self.whole.of(prefill, rank, page_tokens[0])
            sender = SendMover(
                layout(arrays, prefill, rank, page_tokens[0]),
                memory(arrays, torch_buffers),
                config,
                clock,
                host="127.0.0.1",
            )
            self.sent.append(arrays)
            sender.start()
            stack.callback(sender.close)
            self.senders.append(sender)
        for rank in range(decode):
            arrays = [[np.zeros_like(a) for a in buffers] for buffers in self.whole.of(decode, rank, page_tokens[1])]
            self.written.append(arrays)
            own = layout(arrays, decode, rank, page_tokens[1])
            receiver = ReceiveMover(own, memory(arrays, torch_buffers), config, clock)
            receiver.start()
            stack.callback(receiver.close)
            self.receivers.append(receiver)

    def sessions(self, rank: int, room: int | None = None) -> list[PeerSession]:
        prefill, decode = self.widths
        return [
            self.receivers[rank].session(
                "127.0.0.1:1",
                "127.0.0.1",
                self.senders[sender].control_port,
                room,
                PrefillRank(prefill, sender, self.page_tokens[0]),
            )
            for sender in peers(prefill, decode, rank)
        ]

    def expect(self, room: int, slots: list[npt.NDArray[np.int64]], prefix_tokens: int = 0) -> list[Incoming]:
        """All decode ranks ask all their prefill ranks for a room."""
        items = []
        for rank, receiver in enumerate(self.receivers):
            sessions = self.sessions(rank)
            wait_until(lambda sessions=sessions: all(s.up or s.failure for s in sessions), "sessions up")
            assert all(session.up for session in sessions), [session.failure for session in sessions]
            items += [receiver.expect(session, room, slots, prefix_tokens) for session in sessions]
        return items


@contextmanager
def servers(
    prefill: int,
    decode: int,
    config: TransportConfig = CONFIG,
    torch_buffers: bool = False,
    page_tokens: tuple[int, int] = (PAGE_TOKENS, PAGE_TOKENS),
) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(prefill, decode, stack, config, torch_buffers, page_tokens)


def some_slots(seed: int) -> list[npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(SLOTS)[:count].astype(np.int64) for count in COUNTS]


WIDTHS = [(1, 2), (2, 1), (2, 4), (4, 2), (4, 1), (2, 2)]


@pytest.mark.parametrize("codec", ["raw", "shuffle"])
@pytest.mark.parametrize("torch_buffers", [False, True], ids=["host", "torch"])
@pytest.mark.parametrize(("prefill", "decode"), WIDTHS)
def test_every_rank_gets_its_shard(prefill: int, decode: int, torch_buffers: bool, codec: Any) -> None:
    config = msgspec.structs.replace(CONFIG, chunk_bytes=4096, codec=codec)
    with servers(prefill, decode, config, torch_buffers) as both:
        theirs, ours = some_slots(1), some_slots(2)
        items = both.expect(7, theirs)
        requests = [FanOut(sender, 7) for sender in both.senders]
        wait_until(lambda: all(request.state is State.READY for request in requests), "all decode ranks asked")
        for request in requests:
            request.start(COUNTS[0])
            for first, buffers in ((0, [0, 2]), (0, [1, 3, 4])):
                request.send(0, first, ours[0], lambda: None, buffers)
            request.send(1, 0, ours[1], lambda: None)
            request.send(2, 0, ours[2], lambda: None)
            request.finish()
        wait_until(lambda: not any(item.transfer.live for item in items), "the end of the transfers")
        assert joint_state(item.transfer for item in items) is State.DONE, joint_reason(i.transfer for i in items)
        wait_until(lambda: all(request.state is State.DONE for request in requests), "prefill knows")
        saved = sum(item.transfer.bytes - item.transfer.wire_bytes for item in items)
        assert (saved > 0) == (codec != "raw")
        for rank in range(decode):
            for component, (expected, written) in enumerate(
                zip(both.whole.of(decode, rank), both.written[rank], strict=True)
            ):
                for a, b in zip(expected, written, strict=True):
                    np.testing.assert_array_equal(a[ours[component]], b[theirs[component]])
                    untouched = np.setdiff1d(np.arange(SLOTS), theirs[component])
                    assert not b[untouched].any()
        for request in requests:
            request.release()


@pytest.mark.parametrize("page_tokens", [(2, 8), (8, 2), (8, 12)], ids=str)
@pytest.mark.parametrize(("prefill", "decode", "torch_buffers"), [(1, 1, True), (1, 2, False), (2, 1, True)])
def test_pages_of_other_sizes(prefill: int, decode: int, page_tokens: tuple[int, int], torch_buffers: bool) -> None:
    """A prompt of 35 tokens, of which decode has the first page; in two chunks, and a layer of the first ahead."""
    ours, theirs = page_tokens
    tokens, pool = 35, SLOTS * PAGE_TOKENS
    rng = np.random.default_rng(5)
    here = rng.permutation(pool // ours)[: -(-tokens // ours)].astype(np.int64)
    there = rng.permutation(pool // theirs)[: -(-tokens // theirs)].astype(np.int64)
    state, aux = [np.array([slot]) for slot in (3, 4)], [np.array([slot]) for slot in (7, 8)]
    with servers(prefill, decode, CONFIG, torch_buffers, page_tokens) as both:
        items = both.expect(7, [there[1:], state[1], aux[1]], prefix_tokens=theirs)
        requests = [FanOut(sender, 7) for sender in both.senders]
        wait_until(lambda: all(request.state is State.READY for request in requests), "all decode ranks asked")
        for request in requests:
            prompt = request.prompt_pages
            assert prompt is not None
            handed_over = here[prompt.first_token // ours :]
            request.start(prompt.agreed(len(handed_over)))
            half = len(handed_over) // 2
            for first, pages, last in ((0, handed_over[:half], False), (half, handed_over[half:], True)):
                first_unit, units = prompt.units(first, pages, last=last)
                for buffers in ([0, 2], [1, 3, 4]):
                    request.send(0, first_unit, units, lambda: None, buffers)
            request.send(1, 0, state[0], lambda: None)
            request.send(2, 0, aux[0], lambda: None)
            request.finish()
        wait_until(lambda: not any(item.transfer.live for item in items), "the end of the transfers")
        assert joint_state(item.transfer for item in items) is State.DONE, joint_reason(i.transfer for i in items)
        wait_until(lambda: all(request.state is State.DONE for request in requests), "prefill knows")
        for rank in range(decode):
            whole, written = both.whole.of(decode, rank, 1), both.written[rank]
            for token in range(theirs, tokens):
                sent_at = here[token // ours] * ours + token % ours
                came_to = there[token // theirs] * theirs + token % theirs
                for a, b in zip(whole[0], written[0], strict=True):
                    np.testing.assert_array_equal(a[sent_at], b.reshape(pool, -1)[came_to])
            for a, b in zip(written[0], both.whole.of(decode, rank, theirs)[0], strict=True):
                assert a.shape == b.shape
                assert not a[np.setdiff1d(np.arange(len(a)), there[1:])].any(), "nothing else was written"
            for component, slots in ((1, state), (2, aux)):
                for a, b in zip(whole[component], written[component], strict=True):
                    np.testing.assert_array_equal(a[slots[0]], b[slots[1]])
        for request in requests:
            request.release()


def test_one_decode_rank_that_gives_up_ends_the_request_for_all() -> None:
    with servers(1, 2) as both:
        items = both.expect(7, some_slots(1))
        request = FanOut(both.senders[0], 7)
        wait_until(lambda: request.state is State.READY, "all decode ranks asked")
        request.start(COUNTS[0])
        both.receivers[1].abort(items[1], "the client left")
        wait_until(lambda: request.state is State.FAILED, "prefill knows")
        assert "the client left" in request.reason
        wait_until(lambda: not items[0].transfer.live, "the other rank knows")
        assert "another decode rank" in items[0].transfer.reason
        request.release()
        assert both.senders[0]._table.transfers() == []


def test_a_request_waits_for_all_decode_ranks() -> None:
    with servers(1, 2) as both:
        request = FanOut(both.senders[0], 7)
        session = both.sessions(1)[0]
        wait_until(lambda: session.up, "session up")
        both.receivers[1].expect(session, 7, some_slots(1), 0)
        session = both.sessions(0)[0]
        wait_until(lambda: session.up, "session up")
        assert request.state is State.WAITING
        assert request.expected is None
        both.receivers[0].expect(session, 7, some_slots(1), 0)
        wait_until(lambda: request.state is State.READY, "all decode ranks asked")
        assert request.expected is not None
        request.release()


def test_widths_that_do_not_fit_are_refused_with_one_message() -> None:
    with servers(2, 2) as both:
        stranger = layout(both.whole.of(2, 0), 2, 0)
        wide = msgspec.structs.replace(stranger, tp_size=4, tp_rank=3)
        receiver = ReceiveMover(wide, memory(both.whole.of(2, 0), False), CONFIG, MonotonicClock())
        receiver.start()
        try:
            port = both.senders[1].control_port
            session = receiver.session("127.0.0.1:1", "127.0.0.1", port, None, PrefillRank(2, 1))
            wait_until(lambda: session.failure, "refused")
            assert "attention TP width: prefill has 2, decode has 4; " in session.failure
            assert "bytes at width 4" in session.failure
        finally:
            receiver.close()
