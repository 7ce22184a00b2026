"""The state diagrams of docs/protocol.md, made from the tables that the code runs on.

python -m sglang_prfaas.transport.state_diagram docs/protocol.md    writes them between their marks
"""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from sglang_prfaas.transport.health import CONTACTS
from sglang_prfaas.transport.transfer import TRANSITIONS

S = TypeVar("S", bound=enum.Enum)

MARKS = re.compile(r"(<!-- states: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def mermaid(table: Mapping[S, frozenset[S]]) -> str:
    """A table of states and what may follow them, as a Mermaid state diagram."""
    starts = [state for state in table if not any(state in following for following in table.values())]
    lines = [f"    [*] --> {state.name}" for state in starts]
    for state, following in table.items():
        lines += [f"    {state.name} --> {name}" for name in sorted(other.name for other in following)]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


DIAGRAMS = {"transfer": mermaid(TRANSITIONS), "session": mermaid(CONTACTS)}


def rewritten(text: str) -> str:
    """The document with its diagrams made anew."""
    return MARKS.sub(lambda mark: f"{mark[1]}{DIAGRAMS[mark[2]]}\n{mark[3]}", text)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewritten(path.read_text()))
