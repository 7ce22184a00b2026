"""The two processes of a run: each holds its memory once and takes part in every round, whichever mover it is for."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import xxhash

from benchmarks.transport.workload import WORKLOADS, Memory
from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.session import State

HOST = "127.0.0.1"
SEND_SEED, RECEIVE_SEED = 1, 2
POLL_S = 0.0005
MAX_CONNECTIONS = 64
"""Of one session."""
DEADLINE_S = 300.0
"""For one request."""

Configs = dict[tuple[str, int], TransportConfig]
"""By mover and number of connections; `plain` is no mover of ours."""


def digest(memory: Memory, seed: int) -> int:
    """Of a request's items, in order."""
    state = xxhash.xxh3_64()
    for item in memory.items(seed):
        state.update(item)
    result: int = state.intdigest()
    return result


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(POLL_S)


def measured(work: Callable[[tuple[str, int], int], float], arm: tuple[str, int], room: int) -> dict[str, float]:
    """Run `work`, which returns its seconds; adds the CPU seconds of this process."""
    cpu_s = time.process_time()
    wall_s = work(arm, room)
    return {"wall_s": wall_s, "cpu_s": time.process_time() - cpu_s}


def in_threads(work: Callable[[socket.socket, list[memoryview]], None], socks: list[Any], items: list[Any]) -> None:
    """Items dealt out to the connections in turn, one thread each."""
    threads = [
        threading.Thread(target=work, args=(sock, items[index :: len(socks)])) for index, sock in enumerate(socks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send_plain(sock: socket.socket, items: list[memoryview]) -> None:
    for item in items:
        sock.sendall(item)


def receive_plain(sock: socket.socket, items: list[memoryview]) -> None:
    for item in items:
        if not data_tcp.receive_exactly(sock, item):
            raise ConnectionError("closed")


def about(movers: Iterable[SendMover], configs: Configs) -> dict[str, str]:
    """Congestion control and TLS cipher of the data connections."""
    with data_tcp.listen(HOST, 0, next(iter(configs.values()))) as listener:
        congestion = congestion_of(listener)
    ciphers = set()
    for mover in movers:
        until(lambda mover=mover: any(len(s.links) == s.hello.connections for s in mover._sessions.values()))
        for session in mover._sessions.values():
            for link in session.links.values():
                connection = link.connection
                if isinstance(connection.sock, ssl.SSLSocket):
                    ciphers.add("{1} {0}".format(*connection.sock.cipher()))
    return {"congestion": congestion, "tls": ", ".join(sorted(ciphers))}


def congestion_of(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def sending_end(workload: str, configs: Configs, pipe: Connection) -> None:
    """Process of the sender. Commands on `pipe`: ("prfaas" or "plain", connections, room), None to end."""
    memory = Memory(WORKLOADS[workload], 1)
    slots = memory.slots(SEND_SEED)
    movers = {
        arm: SendMover(memory.workload.layout, memory.rank, c, MonotonicClock(), host=HOST)
        for arm, c in configs.items()
        if arm[0] != "plain"
    }
    listeners = {arm: data_tcp.listen(HOST, 0, c) for arm, c in configs.items() if arm[0] == "plain"}
    for mover in movers.values():
        mover.start()
    pipe.send(
        {
            "control": {arm: mover.control_port for arm, mover in movers.items()},
            "plain": {arm: listener.getsockname()[1] for arm, listener in listeners.items()},
            "digest": digest(memory, SEND_SEED),
        }
    )
    plain: dict[tuple[str, int], list[socket.socket]] = {}
    for arm, listener in listeners.items():
        plain[arm] = [listener.accept()[0] for _ in range(arm[1])]
        plain[arm].sort(key=lambda sock: sock.recv(1))
    pipe.send(about(movers.values(), configs))
    items = list(memory.items(SEND_SEED))

    def prfaas(arm: tuple[str, int], room: int) -> float:
        mover = movers[arm]
        transfer = mover.transfer(room)
        until(lambda: transfer.expected)
        began_s = time.monotonic()
        with transfer.lock:
            transfer.start(len(slots[0]))
        if memory.workload.one_by_one:
            for page in range(len(slots[0])):
                mover.send(transfer, 0, page, slots[0][page : page + 1])
                transfer.wait_acknowledged((page + 1) * memory.workload.page_bytes, DEADLINE_S)
        else:
            mover.send(transfer, 0, 0, slots[0])
        mover.send(transfer, 1, 0, slots[1])
        mover.finish(transfer)
        transfer.wait(DEADLINE_S)
        if transfer.state is not State.DONE:
            raise RuntimeError(transfer.reason)
        wall_s = time.monotonic() - began_s
        mover.release(transfer)
        return wall_s

    def sockets(arm: tuple[str, int], _: int) -> float:
        plain[arm][0].recv(1)
        began_s = time.monotonic()
        if memory.workload.one_by_one:
            for item in items:
                plain[arm][0].sendall(item)
                plain[arm][0].recv(1)
            return time.monotonic() - began_s
        in_threads(send_plain, plain[arm], items)
        return time.monotonic() - began_s

    while (command := pipe.recv()) is not None:
        arm, room = (command[0], command[1]), command[2]
        pipe.send(measured(sockets if arm in plain else prfaas, arm, room))
    for mover in movers.values():
        mover.close()


def idle_connections(count: int, memory: Memory, config: TransportConfig, control_port: int) -> list[ReceiveMover]:
    """Decode ranks that open so many connections and ask for nothing."""
    config = msgspec.structs.replace(config, connections=MAX_CONNECTIONS)
    idle = [
        ReceiveMover(memory.workload.layout, memory.rank, config, MonotonicClock(), server=f"idle-{index}")
        for index in range(count // MAX_CONNECTIONS)
    ]
    for mover in idle:
        mover.start()
        session = mover.session(f"{HOST}:0", HOST, control_port)
        until(lambda session=session: session.up or session.failure)
        if session.failure:
            raise RuntimeError(session.failure)
    return idle


def receiving_end(workload: str, configs: Configs, addresses: dict[str, Any], pipe: Connection, idle: int = 0) -> None:
    """idle: connections opened beside those that are used, by the first mover.

    Process of the receiver; it takes the time, from its request until its last byte."""
    memory = Memory(WORKLOADS[workload], None)
    slots = memory.slots(RECEIVE_SEED)
    movers = {
        arm: ReceiveMover(memory.workload.layout, memory.rank, c, MonotonicClock())
        for arm, c in configs.items()
        if arm[0] != "plain"
    }
    sessions = {}
    for arm, mover in movers.items():
        mover.start()
        sessions[arm] = session = mover.session(f"{HOST}:0", HOST, addresses["control"][arm])
        until(lambda session=session: session.up or session.failure)
    if idle:
        first = next(iter(movers))
        waiting = idle_connections(idle, memory, configs[first], addresses["control"][first])
    else:
        waiting = []
    plain: dict[tuple[str, int], list[socket.socket]] = {}
    for arm, port in addresses["plain"].items():
        plain[arm] = []
        for index in range(arm[1]):
            connection = data_tcp.unconnected(HOST, configs[arm])
            data_tcp.connect(connection, HOST, port, 30.0)
            connection.sock.settimeout(None)
            connection.sock.sendall(bytes([index]))
            plain[arm].append(connection.sock)
    items = list(memory.items(RECEIVE_SEED))

    def prfaas(arm: tuple[str, int], room: int) -> float:
        mover = movers[arm]
        began_s = time.monotonic()
        item = mover.expect(sessions[arm], room, slots, 0)
        item.transfer.wait(DEADLINE_S)
        if item.transfer.state is not State.DONE:
            raise RuntimeError(item.transfer.reason)
        mover.release(item)
        return item.transfer.last_byte_s - began_s

    def sockets(arm: tuple[str, int], _: int) -> float:
        began_s = time.monotonic()
        plain[arm][0].sendall(b"g")
        if memory.workload.one_by_one:
            for item in items:
                receive_plain(plain[arm][0], [item])
                plain[arm][0].sendall(b"a")
            return time.monotonic() - began_s
        in_threads(receive_plain, plain[arm], items)
        return time.monotonic() - began_s

    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        memory.clear()
        arm, room = (command[0], command[1]), command[2]
        result = measured(sockets if arm in plain else prfaas, arm, room)
        pipe.send({**result, "digest": digest(memory, RECEIVE_SEED)})
    for mover in [*movers.values(), *waiting]:
        mover.close()
