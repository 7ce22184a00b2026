"""The document's state diagrams are those of the code."""

from __future__ import annotations

from pathlib import Path

from sglang_prfaas.transport.state_diagram import DIAGRAMS, MARKS, rewritten

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "protocol.md"


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert {mark[2] for mark in MARKS.finditer(text)} == set(DIAGRAMS)
    assert rewritten(text) == text, "run python -m sglang_prfaas.transport.state_diagram docs/protocol.md"


def test_a_change_is_noticed() -> None:
    text = DOCUMENT.read_text()
    assert rewritten(text.replace("WAITING --> READY", "WAITING --> DONE")) == text
