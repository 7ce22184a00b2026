"""Configurations to start from; tests change one thing and look at what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

PD = """
[site]
name = "pd"
role = "pd"
model = "owner/model"

[[servers]]
name = "prefill-0"
role = "prefill"
port = 30000
bootstrap_port = 8998
mover_port = 31000

[[servers]]
name = "decode-0"
role = "decode"
port = 30001

[agent]
port = 9000
"""

PRFAAS = """
[site]
name = "prfaas"
role = "prfaas"
model = "owner/model"

[[servers]]
name = "prefill-0"
role = "prefill"
port = 30010
bootstrap_port = 9998
mover_port = 31010

[agent]
port = 9010
"""

ROUTER = """
[router]
model = "owner/model"

[policy]
threshold_tokens = 2000

[[sites]]
name = "pd"
role = "pd"
agent_url = "http://127.0.0.1:9000"

[[sites]]
name = "prfaas"
role = "prfaas"
agent_url = "http://127.0.0.1:9010"
"""

WriteToml = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> WriteToml:
    """Writes a file below a fresh directory and returns its path."""

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file
