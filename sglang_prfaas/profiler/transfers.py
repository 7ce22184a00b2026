"""Bytes of real transfers between two servers, from the transfer log, and the round trip between their sites."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from sglang_prfaas.errors import PeerError
from sglang_prfaas.profiler.budget import SLACK_S, Budget
from sglang_prfaas.profiler.decode import Legs
from sglang_prfaas.profiler.sglang_api import RefusedError, unique_prompt
from sglang_prfaas.profiler.summary import Transfer
from sglang_prfaas.transport.transfer_log import TransferRecord

_LOG_S = 10.0
"""How long a finished transfer may take to appear in the log."""
_LOOK_S = 0.1
_CONNECTS = 5


async def measure_transfers(
    legs: Legs,
    lengths: Sequence[int],
    log: str,
    *,
    vocabulary: int,
    repeats: int,
    budget: Budget,
    say: Callable[[str], None],
) -> list[Transfer]:
    """Send prompts of each length through a pair, one at a time, and read from the log what moved.

    The first of all is not counted: it opens the session. Stops at the first length that is refused, or when time is
    up. Raises PeerError where a server fails, or the log stays empty.
    """
    assert legs.prefill is not None
    found: list[Transfer] = []
    tail = LogTail(log)
    spent_s = 0.0
    for index, tokens in enumerate(sorted(lengths)):
        for repeat in range(repeats + (index == 0)):
            if found and not budget.fits(2 * spent_s):
                return found
            pair, started_s = legs.pair(), time.perf_counter()
            assert pair is not None
            prompt = unique_prompt(tokens, vocabulary)
            both = [
                asyncio.create_task(api.generate(prompt, 2, pair, timeout_s=budget.left_s + SLACK_S))
                for api in (legs.prefill, legs.decode)
            ]
            try:
                await asyncio.gather(*both)
            except RefusedError:
                return found
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)
            spent_s = time.perf_counter() - started_s
            transfer = _joined(tokens, await tail.received(pair.bootstrap_room))
            if index or repeat:
                found.append(transfer)
        if found and found[-1].transfer_s > 0:
            rate = found[-1].bytes / found[-1].transfer_s / 1e6
            say(f"{tokens} tokens: {found[-1].bytes} bytes moved, {rate:.1f} MB/s")
    return found


async def round_trip_s(url: str) -> float:
    """The shortest of a few TCP connects to a server. Raises PeerError."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    best = float("inf")
    for _ in range(_CONNECTS):
        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(SLACK_S):
                _, writer = await asyncio.open_connection(parts.hostname, port)
        except (OSError, TimeoutError) as error:
            raise PeerError(f"no connection to {parts.hostname}:{port}: {error}") from error
        best = min(best, time.perf_counter() - started_s)
        writer.close()
        await writer.wait_closed()
    return best


def _joined(tokens: int, records: Sequence[TransferRecord]) -> Transfer:
    """All ranks of one request."""
    return Transfer(
        tokens=tokens,
        bytes=sum(record.bytes for record in records),
        transfer_s=max(record.transfer_s for record in records),
    )


class LogTail:
    """What is appended to a transfer log from now on."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._offset = Path(path).stat().st_size if Path(path).exists() else 0
        self._records: list[TransferRecord] = []

    async def received(self, room: int) -> list[TransferRecord]:
        """What decode's ranks noted of a room, each as it ends: until two looks in a row find the same.

        Raises PeerError where nothing comes.
        """
        deadline_s = time.perf_counter() + _LOG_S
        before = -1
        while True:
            self._read()
            found = [r for r in self._records if r.room == room and r.role == "decode" and r.status == "done"]
            if found and len(found) == before:
                self._records.clear()
                return found
            if time.perf_counter() > deadline_s:
                raise PeerError(
                    f"{self.path} says nothing of a transfer that is over; it must be the file that the decode "
                    "servers' PRFAAS_TRANSFER_LOG names, and readable here"
                )
            before = len(found)
            await asyncio.sleep(_LOOK_S)

    def _read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                lines, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(lines) + len(newline)
        self._records += [msgspec.json.decode(line, type=TransferRecord) for line in lines.split(b"\n") if line]
