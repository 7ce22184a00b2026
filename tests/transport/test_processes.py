"""Peers that are killed, stopped or restarted: the other end is a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.health import Contact
from sglang_prfaas.transport.security import make
from sglang_prfaas.transport.transfer import State
from tests.transport.addresses import HERE, free_pair
from tests.transport.keyring import now
from tests.transport.rig import (
    CONFIG,
    PAGES,
    Memory,
    Pair,
    assert_moved,
    layout,
    lines,
    some_slots,
    wait_ended,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE_S = 1.0
"""For noticing a killed peer, on a machine that has nothing else to do."""
SILENCE_S = float(os.environ.get("PRFAAS_SILENCE_S", "1.5"))
"""After so long a stopped peer has to be noticed."""
BUSY_S = float(os.environ.get("PRFAAS_TEST_BUSY_S", "2"))
"""Beyond that, for one that runs other tests too; far below the timeout for a link that was cut."""


class Peer:
    """A peer process; see `peer.py`."""

    def __init__(self, role: str, port: int, keys: str, host: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transport.peer", role, str(port), host, *([keys] if keys else [])],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the peer process ended with {self.process.wait()}"
        return line.split()

    def say(self, command: str, room: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command} {room}\n")
        self.process.stdin.flush()

    def do(self, command: str, room: int) -> list[str]:
        self.say(command, room)
        return self.line()


@contextmanager
def peer(role: str, port: int = 0, keys: str = "", host: str = HERE) -> Iterator[Peer]:
    started = Peer(role, port, keys, host)
    try:
        yield started
    finally:
        process = started.process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture(params=["off", "keys"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TransportConfig:
    """Without keys, and with those of one site for both ends."""
    if request.param == "off":
        return CONFIG
    make.make_keys(tmp_path, {"pd": ()}, now=now())
    return msgspec.structs.replace(CONFIG, keys_dir=str(tmp_path / "pd"))


def test_between_two_processes(config: TransportConfig) -> None:
    with peer("prefill", keys=config.keys_dir) as prefill, Pair(config=config) as pair:
        pair.sender.control_port = int(prefill.line()[1])
        slots = some_slots(7)
        item = pair.receiver.expect(pair.session(), 7, slots, 0)
        prefill.do("half", 7)
        prefill.do("rest", 7)
        wait_ended(item.transfer)
        assert item.transfer.state is State.DONE
        assert_moved(pair.source, slots, pair.target, slots)


def test_prefill_is_killed_in_the_middle_and_restarted(config: TransportConfig) -> None:
    with Pair(config=config) as pair:
        with peer("prefill", free_pair(HERE), config.keys_dir) as prefill:
            port = int(prefill.line()[1])
            pair.sender.control_port = port
            slots = some_slots(7)
            session = pair.session()
            item = pair.receiver.expect(session, 7, slots, 0)
            prefill.do("half", 7)
            wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
            killed_s = time.monotonic()
            prefill.process.kill()
            wait_ended(item.transfer)
            assert time.monotonic() - killed_s < AT_ONCE_S + BUSY_S
            assert item.transfer.state is State.FAILED
            assert item.transfer.reason.startswith(f"prefill 127.0.0.1:{port}: ")
        with peer("prefill", port, config.keys_dir) as again:
            assert int(again.line()[1]) == port
            slots = some_slots(8)
            item = pair.receiver.expect(pair.session(), 8, slots, 0)
            assert item.session is not session
            again.do("half", 8)
            again.do("rest", 8)
            wait_ended(item.transfer)
            assert_moved(pair.source, slots, pair.target, slots)


def test_decode_is_killed_in_the_middle(config: TransportConfig) -> None:
    with Pair(config=config) as pair, peer("decode", pair.sender.control_port, config.keys_dir) as decode:
        slots = some_slots(7)
        transfer = pair.sender.transfer(7)
        waiting = pair.sender.transfer(8)
        decode.do("expect", 7)
        decode.do("expect", 8)
        wait_until(lambda: transfer.expected and waiting.expected, "decode asked")
        with transfer.lock:
            transfer.start(20)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:10])
        wait_until(lambda: decode.do("state", 7) == ["receiving", str(10 * 6000)], "half of the pages")
        killed_s = time.monotonic()
        decode.process.kill()
        wait_ended(transfer, waiting)
        took_s = time.monotonic() - killed_s
        assert took_s < AT_ONCE_S + BUSY_S
        for ended in (transfer, waiting):
            assert ended.reason.startswith("connection to decode pd/decode-0 lost: its process has ended")
        wait_until(lambda: not pair.sender._table.sessions, "end of the session")


def test_decode_is_killed_right_after_it_asked(config: TransportConfig) -> None:
    """Whether or not its data connections stand already."""
    with Pair(config=config) as pair, peer("decode", pair.sender.control_port, config.keys_dir) as decode:
        transfer = pair.sender.transfer(7)
        decode.say("expect", 7)
        wait_until(lambda: transfer.expected, "decode asked")
        killed_s = time.monotonic()
        decode.process.kill()
        wait_ended(transfer)
        assert time.monotonic() - killed_s < AT_ONCE_S + BUSY_S
        assert transfer.reason.startswith("connection to decode pd/decode-0 lost: its process has ended")


def noticed_after_s(caplog: pytest.LogCaptureFixture, *line: str) -> float:
    """Seconds from now until the log says that the peer is silent, or has given it up. What becomes of its connections
    meanwhile does not: its system takes those that are dialled again."""
    stopped_s = time.monotonic()
    wait_until(lambda: lines(caplog, *line) or lines(caplog, "session with"), "silence noticed")
    noticed_s = time.monotonic() - stopped_s
    print(f"noticed after {noticed_s:.2f} s")
    return noticed_s


def test_prefill_is_stopped_in_the_middle(config: TransportConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = msgspec.structs.replace(config, heartbeat_timeout_s=SILENCE_S, reconnect_timeout_s=1.0)
    with peer("prefill", keys=config.keys_dir) as prefill, Pair(config=config) as pair:
        pair.sender.control_port = int(prefill.line()[1])
        item = pair.receiver.expect(pair.session(), 7, some_slots(7), 0)
        prefill.do("half", 7)
        wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
        prefill.process.send_signal(signal.SIGSTOP)
        assert noticed_after_s(caplog, "is silent; its 3 data connections are made anew") < SILENCE_S + BUSY_S
        wait_ended(item.transfer)
        assert re.search("silent for|came back within|come back within", item.transfer.reason)


def test_a_silence_longer_than_its_timeout_costs_no_request(
    config: TransportConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = msgspec.structs.replace(config, heartbeat_timeout_s=1.0, reconnect_timeout_s=30.0)
    with peer("prefill", keys=config.keys_dir) as prefill, Pair(config=config) as pair:
        pair.sender.control_port = int(prefill.line()[1])
        slots = some_slots(7)
        item = pair.receiver.expect(pair.session(), 7, slots, 0)
        prefill.do("half", 7)
        wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
        prefill.process.send_signal(signal.SIGSTOP)
        assert noticed_after_s(caplog, "is silent; its 3 data connections are made anew") < 1.0 + AT_ONCE_S + BUSY_S
        prefill.process.send_signal(signal.SIGCONT)
        prefill.do("rest", 7)
        wait_ended(item.transfer)
        assert item.transfer.state is State.DONE, item.transfer.reason
        assert_moved(pair.source, slots, pair.target, slots)


def test_decode_is_stopped_in_the_middle(config: TransportConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = msgspec.structs.replace(config, heartbeat_timeout_s=SILENCE_S, reconnect_timeout_s=1.0)
    memory = Memory(layout(), 1)
    with (
        Pair(config=config, send_memory=memory) as pair,
        peer("decode", pair.sender.control_port, config.keys_dir) as decode,
    ):
        transfer = pair.sender.transfer(7)
        decode.do("expect", 7)
        wait_until(lambda: transfer.expected, "decode asked")
        (theirs,) = pair.sender._table.sessions.values()
        wait_until(lambda: theirs.health.contact is Contact.UP, "all connections")
        decode.process.send_signal(signal.SIGSTOP)
        line = "data connection", f"lost: silent for {SILENCE_S:g} s"
        assert noticed_after_s(caplog, *line) < SILENCE_S + BUSY_S
        wait_ended(transfer)
        assert re.search("silent for|came back within", transfer.reason)
