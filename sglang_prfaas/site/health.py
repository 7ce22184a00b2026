"""Health checks of servers over HTTP, as little as it takes."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from sglang_prfaas.core.addresses import authority


async def answers_ok(host: str, port: int, path: str, timeout_s: float) -> bool:
    """Whether `GET path` is answered with a 2xx status within the time. Never raises for a peer's fault."""
    request = f"GET {path} HTTP/1.1\r\nHost: {authority(host, port)}\r\nConnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request.encode())
                status = await reader.readline()
            finally:
                await _close(writer)
    except (OSError, TimeoutError, ValueError):
        return False
    parts = status.split()
    return len(parts) >= 2 and parts[0].startswith(b"HTTP/") and parts[1].startswith(b"2")


async def listens(host: str, port: int, timeout_s: float) -> bool:
    """Whether a TCP connection is accepted within the time."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
            await _close(writer)
    except (OSError, TimeoutError):
        return False
    return True


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
