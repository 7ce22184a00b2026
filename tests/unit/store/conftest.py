from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.stats import Counters


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def disk(tmp_path: Path, counters: Counters) -> Iterator[DiskStore]:
    """A store of 64 MiB."""
    store = DiskStore(tmp_path / "store", 64 << 20, counters)
    yield store
    store.close()
