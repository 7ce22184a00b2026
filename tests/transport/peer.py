"""One end of a mover in a process of its own, driven over standard input and output:

python -m tests.transport.peer prefill PORT HOST [KEYS]   prints its control port; `half ROOM` and `rest ROOM` send
python -m tests.transport.peer decode PORT HOST [KEYS]    dials a control port; `expect ROOM` asks, `state ROOM` prints
"""

from __future__ import annotations

import sys

import msgspec

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from tests.transport.rig import CONFIG, PAGES, Memory, layout, some_slots, wait_until


def say(*words: object) -> None:
    print(*words, flush=True)


def prefill(port: int, host: str, config: TransportConfig) -> None:
    memory = Memory(layout(), 1)
    mover = SendMover(layout(), memory.rank, config, MonotonicClock(), host=host, first_port=port)
    mover.start()
    say("port", mover.control_port, mover.data_port)
    transfers = {}
    for line in sys.stdin:
        command, room = line.split()[0], int(line.split()[1])
        slots = some_slots(room)
        if command == "half":
            transfer = transfers[room] = mover.transfer(room)
            wait_until(lambda transfer=transfer: transfer.expected, "decode asked")
            with transfer.lock:
                transfer.start(len(slots[PAGES]))
            mover.send(transfer, PAGES, 0, slots[PAGES][:10])
        else:
            transfer = transfers[room]
            mover.send(transfer, PAGES, 10, slots[PAGES][10:])
            for component in (1, 2):
                mover.send(transfer, component, 0, slots[component])
            mover.finish(transfer)
        say(command, room)
    mover.close()


def decode(port: int, host: str, config: TransportConfig) -> None:
    memory = Memory(layout(), None)
    mover = ReceiveMover(layout(), memory.rank, config, MonotonicClock(), site="pd", server="decode-0")
    mover.start()
    items = {}
    for line in sys.stdin:
        command, room = line.split()[0], int(line.split()[1])
        if command == "expect":
            session = mover.session(f"{host}:1", host, port)
            items[room] = mover.expect(session, room, some_slots(room), 0)
            say("expect", room)
        else:
            say(items[room].transfer.state.value, items[room].transfer.bytes)
    mover.close()


if __name__ == "__main__":
    keyed = msgspec.structs.replace(CONFIG, keys_dir=sys.argv[4] if len(sys.argv) > 4 else "")
    {"prefill": prefill, "decode": decode}[sys.argv[1]](int(sys.argv[2]), sys.argv[3], keyed)
