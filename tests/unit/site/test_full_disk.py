"""A disk without room for logs costs lines of them, and no server."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import sys
from pathlib import Path

import pytest

from sglang_prfaas.launch.overrides import say
from sglang_prfaas.site.process import ChildProcess, note
from sglang_prfaas.site.progress import Progress

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_process_starts_without_its_log() -> None:
    async def main() -> int:
        process = await ChildProcess.spawn([sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ), FULL)
        return await process.wait()

    assert asyncio.run(main()) == 7


def test_notes_and_progress_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    note(FULL, "a line")
    note(FULL / "no-directory", "a line")
    monkeypatch.setattr("sys.stderr", Full())
    Progress("pd").say("a line")
    say("a line")
