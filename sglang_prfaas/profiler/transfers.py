"""Bytes of real transfers between two servers, from the transfer log, and the round trip between their sites."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import PeerError
from sglang_prfaas.profiler.budget import SLACK_S, Budget
from sglang_prfaas.profiler.decode import Legs
from sglang_prfaas.profiler.sglang_api import RefusedError, unique_prompt
from sglang_prfaas.profiler.summary import Round, Transfer, busy_s
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
    found: list[Transfer] = []
    tail = LogTail(log)
    spent_s = 0.0
    for index, tokens in enumerate(sorted(lengths)):
        for repeat in range(repeats + (index == 0)):
            if found and not budget.fits(2 * spent_s):
                return found
            started_s = time.perf_counter()
            try:
                room = await _send(legs, tokens, vocabulary, budget)
            except RefusedError:
                return found
            spent_s = time.perf_counter() - started_s
            transfer = _joined(tokens, await tail.received(room))
            if index or repeat:
                found.append(transfer)
        if found and found[-1].transfer_s > 0:
            rate = found[-1].bytes / found[-1].transfer_s / 1e6
            say(f"{tokens} tokens: {found[-1].bytes} bytes moved, {rate:.1f} MB/s")
    return found


async def measure_together(
    legs: Legs,
    lengths: Sequence[int],
    log: str,
    *,
    at_once: int,
    vocabulary: int,
    repeats: int,
    budget: Budget,
    say: Callable[[str], None],
) -> list[Round]:
    """Send `at_once` prompts of a length together, for each length, and read from the log when how much moved.

    Stops as `measure_transfers` does. Raises PeerError where a server fails, or the log stays empty.
    """
    found: list[Round] = []
    tail = LogTail(log)
    spent_s = 0.0
    for tokens in sorted(lengths):
        for _ in range(repeats):
            if not budget.fits(2 * spent_s):
                return found
            started_s = time.perf_counter()
            tasks = [asyncio.create_task(_send(legs, tokens, vocabulary, budget)) for _ in range(at_once)]
            try:
                rooms = await asyncio.gather(*tasks)
            except RefusedError:
                return found
            finally:
                await _end(tasks)
            spent_s = time.perf_counter() - started_s
            records = [record for room in rooms for record in await tail.received(room)]
            moved = sum(record.bytes for record in records)
            seconds = busy_s((record.unix_time_s - record.transfer_s, record.unix_time_s) for record in records)
            found.append(Round(tokens=tokens, at_once=at_once, bytes=moved, busy_s=seconds))
        if found and found[-1].busy_s > 0:
            rate = found[-1].bytes / found[-1].busy_s / 1e6
            say(f"{at_once} times {tokens} tokens: {found[-1].bytes} bytes moved, {rate:.1f} MB/s")
    return found


async def _send(legs: Legs, tokens: int, vocabulary: int, budget: Budget) -> int:
    """One prompt through a pair; returns its room. Raises RefusedError, PeerError."""
    pair = legs.pair()
    assert legs.prefill is not None
    assert pair is not None
    prompt = unique_prompt(tokens, vocabulary)
    both = [
        asyncio.create_task(api.generate(prompt, 2, pair, timeout_s=budget.left_s + SLACK_S))
        for api in (legs.prefill, legs.decode)
    ]
    try:
        await asyncio.gather(*both)
    finally:
        await _end(both)
    return pair.bootstrap_room


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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
            raise PeerError(f"no connection to {authority(parts.hostname or '', port)}: {error}") from error
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
                self._records = [record for record in self._records if record.room != room]
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
