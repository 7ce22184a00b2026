"""Keys of a small deployment."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from sglang_prfaas.transport.security import make

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Directory with the keys of sites pd (at 10.2.0.0/24) and prfaas (anywhere)."""
    make.make_keys(tmp_path / "keys", {"pd": ("10.2.0.0/24", "pd.example.org"), "prfaas": ()}, now=NOW)
    return tmp_path / "keys"
