"""Roles that servers report."""

from __future__ import annotations

import pytest

from sglang_prfaas.site.roles import role_in


@pytest.mark.parametrize(
    ("body", "role"),
    [
        (b'{"version":"0.5.23","loads":[{"dp_rank":0,"disaggregation":{"mode":"decode","x":1}}]}', "decode"),
        (b'{"loads":[{"disaggregation":{"mode":"prefill"}},{"disaggregation":{"mode":"prefill"}}]}', "prefill"),
        (b'{"loads":[{"disaggregation":{"mode":"null"}}]}', ""),
        (b'{"loads":[{"disaggregation":null}]}', ""),
        (b'{"loads":[]}', ""),
        (b"{}", ""),
        (b"no json", ""),
        (b'{"loads":7}', ""),
    ],
)
def test_what_a_server_says_of_its_role(body: bytes, role: str) -> None:
    assert role_in(body) == role
