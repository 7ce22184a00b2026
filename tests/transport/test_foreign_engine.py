"""An engine that knows nothing but docs/protocol.md takes KVCache from a mover, and gives it some."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import numpy as np

from sglang_prfaas.transport.transfer import State
from tests.transport import foreign_engine
from tests.transport.foreign_engine import ForeignDecode, ForeignPrefill
from tests.transport.rig import DEADLINE_S, PAGES, Memory, Pair, layout, some_slots, wait_ended, wait_until

COUNTS = (20, 2, 1)


def as_announced() -> dict[str, Any]:
    ours = layout()
    return foreign_engine.layout(
        [(component.name, component.item_bytes) for component in ours.components],
        model=ours.model,
        kv_dtype=ours.kv_dtype,
        page_tokens=ours.page_tokens,
        tp_size=1,
        kv_format="",
        layer_ids=list(ours.layer_ids),
        tp_rank=0,
    )


def items_of(memory: Memory, slots: list[Any]) -> list[list[list[bytes]]]:
    """`[component][buffer][item]`"""
    return [
        [[bytes(row) for row in buffer[taken]] for buffer in buffers]
        for buffers, taken in zip(memory.arrays, slots, strict=True)
    ]


def test_it_shares_no_code_with_the_mover() -> None:
    tree = ast.parse(Path(foreign_engine.__file__).read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not [name for name in modules if name.startswith(("sglang_prfaas", "tests"))]


def test_it_decodes() -> None:
    slots = some_slots(1, COUNTS)
    with Pair() as pair, ForeignDecode("127.0.0.1", pair.sender.control_port, as_announced(), DEADLINE_S) as decode:
        transfer = pair.sender.transfer(7)
        got: list[Any] = []
        taking = threading.Thread(target=lambda: got.append(decode.request(7, COUNTS)))
        taking.start()
        wait_until(lambda: transfer.expected, "it asked")
        with transfer.lock:
            transfer.start(COUNTS[PAGES])
        pair.send_all(transfer, slots)
        taking.join(DEADLINE_S)
        wait_ended(transfer)
        assert transfer.state is State.DONE, transfer.reason
        assert got == [items_of(pair.source, slots)]
        decode.dealer.send(decode.envelopes.seal("Bye", "it stops"))
        wait_until(lambda: not pair.sender._table.sessions, "end of its session")


def test_it_prefills() -> None:
    slots = some_slots(2, COUNTS)
    with Pair() as pair, ForeignPrefill(DEADLINE_S) as prefill:
        sent = items_of(pair.source, some_slots(1, COUNTS))
        rooms: list[int] = []
        serving = threading.Thread(target=lambda: rooms.append(prefill.serve(prefill.open(), sent)))
        serving.start()
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        item = pair.receiver.expect(session, 7, slots, 0)
        wait_ended(item.transfer)
        serving.join(DEADLINE_S)
        assert item.transfer.state is State.DONE, item.transfer.reason
        assert items_of(pair.target, slots) == sent
        assert rooms == [7]
        assert item.transfer.corrupt_chunks == 1
        for component, buffers in enumerate(pair.target.arrays):
            rest = np.setdiff1d(np.arange(len(buffers[0])), slots[component])
            assert not any(buffer[rest].any() for buffer in buffers)
