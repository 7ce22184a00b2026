"""Host and port in one text, and nowhere by hand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sglang_prfaas
from sglang_prfaas.core.addresses import authority, base_url, bracketed

PACKAGE = Path(sglang_prfaas.__file__).parent


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.2.0.21", "10.2.0.21:80"),
        ("node7.example.org", "node7.example.org:80"),
        ("fd00::21", "[fd00::21]:80"),
        ("[fd00::21]", "[fd00::21]:80"),
        ("fe80::1%eth0", "[fe80::1%eth0]:80"),
        ("::", "[::]:80"),
        ("", ":80"),
    ],
)
def test_ipv6_addresses_have_brackets_once(host: str, expected: str) -> None:
    assert authority(host, 80) == expected
    assert f"{bracketed(host)}:80" == expected
    assert base_url("https", host, 80) == f"https://{expected}"


def joined_by_hand(source: str) -> Iterator[str]:
    """f-strings and log formats in which a port follows something else after a bare colon."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            for before, colon, after in zip(node.values, node.values[1:], node.values[2:], strict=False):
                values = isinstance(before, ast.FormattedValue) and isinstance(after, ast.FormattedValue)
                if values and getattr(colon, "value", "") == ":" and "port" in ast.unparse(after):
                    yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "%s:%d" in node.value:
            yield ast.unparse(node)


def test_the_search_finds_what_it_looks_for() -> None:
    assert list(joined_by_hand("url = f'http://{config.host}:{port}/x'"))
    assert list(joined_by_hand("log.info('at %s:%d', host, port)"))
    assert not list(joined_by_hand("url = f'{name}: {port}'"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_joins_host_and_port_by_hand(path: Path) -> None:
    if path == PACKAGE / "core" / "addresses.py":
        return
    found = list(joined_by_hand(path.read_text()))
    assert not found, f"use sglang_prfaas.core.addresses, which knows IPv6: {found}"
