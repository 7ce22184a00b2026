"""The transfer log."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sglang_prfaas.transport import transfer_log
from sglang_prfaas.transport.transfer_log import TransferRecord


def test_round_trip(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    assert transfer_log.read(path) == []
    records = [
        TransferRecord(role=role, room=1 << 62, status="done", unix_time_s=1.5, bytes=7)
        for role in ("prefill", "decode")
    ]
    for record in records:
        transfer_log.append(path, record)
    assert transfer_log.read(path) == records


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    path = str(tmp_path / "log")

    def write(room: int) -> None:
        for _ in range(50):
            record = TransferRecord(role="decode", room=room, status="failed", unix_time_s=0.0, reason="x" * 500)
            transfer_log.append(path, record)

    threads = [threading.Thread(target=write, args=(room,)) for room in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.room for record in transfer_log.read(path)) == sorted([*range(4)] * 50)


def test_a_line_that_a_full_disk_cut_short_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record = TransferRecord(role="decode", room=1, status="done", unix_time_s=0.0)
    transfer_log.append(str(path), record)
    with path.open("ab") as file:
        file.write(b'{"role":"prefi\n')
    transfer_log.append(str(path), record)
    assert transfer_log.read(str(path)) == [record, record]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"):
        transfer_log.append("/dev/full", TransferRecord(role="decode", room=1, status="done", unix_time_s=0.0))
