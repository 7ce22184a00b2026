"""The bootstrap directory, its ranks and those who look them up."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import pytest
import zmq

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport import directory as directory_module
from sglang_prfaas.transport.directory import DirectoryServer
from sglang_prfaas.transport.messages import Directory, Lookup, RankInfo, Register, decode_from_directory, encode
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.registration import Registration
from tests.transport.rig import CONFIG, Memory, layout, wait_until


def registration(
    port: int, tp_rank: int = 0, tp_size: int = 1, control_port: int = 7000, host: str = "127.0.0.1"
) -> Registration:
    made = Registration(
        host,
        port,
        RankInfo(0, tp_rank, 0, "", control_port),
        MonotonicClock(),
        dp_size=1,
        tp_size=tp_size,
        pp_size=1,
        follow_bootstrap_room=True,
    )
    made.start()
    return made


class Asker:
    """A decode rank that asks a directory again and again."""

    def __init__(self, host: str, port: int) -> None:
        self.mover = ReceiveMover(layout(), Memory(layout(), None).rank, CONFIG, MonotonicClock())
        self.host, self.port = host, port

    def __enter__(self) -> Asker:
        self.mover.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mover.close()

    def until(self, accept: Callable[[Directory], object]) -> Directory:
        found: list[Directory] = []

        def asked() -> bool:
            answer = self.mover.directory(self.host, self.port)
            if answer is not None and accept(answer):
                found.append(answer)
            elif answer is not None:
                self.mover.forget(self.host, self.port)
            return bool(found)

        wait_until(asked, "the directory's answer")
        return found[0]


@pytest.mark.parametrize(
    ("bound", "asked"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1"), ("::", "::1")],
)
def test_ranks_register_are_found_and_leave(bound: str, asked: str) -> None:
    server = DirectoryServer(bound, 0, config=TransportConfig(security="off"))
    ranks = [registration(server.port, r, 2, 7000 + 2 * r, asked) for r in (0, 1)]
    try:
        with Asker(asked, server.port) as asker:
            found = asker.until(lambda answer: answer.complete)
            assert {(r.tp_rank, r.control_port) for r in found.ranks} == {(0, 7000), (1, 7002)}
            ranks[1].close()
            assert not server.table.directory().complete
            asker.mover.forget(asked, server.port)
            assert asker.mover.directory(asked, server.port) is None
            ranks.append(registration(server.port, 1, 2, 9000, asked))
            found = asker.until(lambda answer: answer.complete)
            assert {r.control_port for r in found.ranks} == {7000, 9000}
    finally:
        for rank in ranks:
            rank.close()
        server.close()


def test_a_directory_that_starts_later_than_its_ranks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    rank = registration(port)
    try:
        with Asker("127.0.0.1", port) as asker:
            assert asker.mover.directory("127.0.0.1", port) is None
            server = DirectoryServer("127.0.0.1", port)
            try:
                assert asker.until(lambda answer: answer.complete).ranks[0].control_port == 7000
            finally:
                server.close()
    finally:
        rank.close(timeout_s=0.1)


def test_a_restarted_rank() -> None:
    server = DirectoryServer("127.0.0.1", 0)
    old, new = registration(server.port, control_port=7000), None
    try:
        with Asker("127.0.0.1", server.port) as asker:
            asker.until(lambda answer: answer.ranks[0].control_port == 7000)
            new = registration(server.port, control_port=8000)
            asker.mover.forget("127.0.0.1", server.port)
            asker.until(lambda answer: answer.ranks[0].control_port == 8000)
            old.close()
            assert server.table.directory().complete
    finally:
        old.close()
        if new is not None:
            new.close()
        server.close()


def test_a_port_that_is_taken() -> None:
    server = DirectoryServer("127.0.0.1", 0)
    try:
        with pytest.raises(LocalError, match=rf"port {server.port} on 127.0.0.1 cannot be used: .*bootstrap-port"):
            DirectoryServer("127.0.0.1", server.port)
    finally:
        server.close()


def test_registration_from_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "is_local", lambda address, host: False)
    server = DirectoryServer("127.0.0.1", 0)
    open_server = DirectoryServer("127.0.0.1", 0, remote_ranks=True)
    context = zmq.Context()
    try:
        for target, accepted in ((server, False), (open_server, True)):
            sock = context.socket(zmq.DEALER)
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.RCVTIMEO, 60_000)
            sock.connect(f"tcp://127.0.0.1:{target.port}")
            for garbage in (b"", os.urandom(50), b"\x91\xa4Ping"):
                sock.send(garbage)
            sock.send(encode(Register(RankInfo(0, 0, 0, "", 7000), "boot", 1, 1, 1, True)))
            sock.send(encode(Register(RankInfo(0, 5, 0, "", 7000), "boot", 1, 1, 1, True)))
            sock.send(encode(Lookup()))
            answers = [decode_from_directory(sock.recv()) for _ in range(2 if accepted else 1)]
            assert isinstance(answers[-1], Directory)
            assert answers[-1].complete is accepted
            sock.close()
    finally:
        context.destroy(linger=0)
        server.close()
        open_server.close()


def test_closing_without_a_directory_does_not_take_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    rank = registration(port)
    began_s = time.monotonic()
    rank.close(timeout_s=0.1)
    rank.close(timeout_s=0.1)
    assert time.monotonic() - began_s < 10.0
