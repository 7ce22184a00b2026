"""What the documents point at exists: files, headings, commands, modules, tests, configuration keys of examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_prfaas.launch.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "kernels" / "README.md"])
TEXTS = {path.relative_to(ROOT): path.read_text() for path in DOCUMENTS}

each = pytest.mark.parametrize("name", TEXTS, ids=str)


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each
def test_links_lead_somewhere(name: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name.parent / file).resolve() if file else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    assert not wrong


@each
def test_commands_exist(name: Path) -> None:
    text = TEXTS[name]
    launched = set(re.findall(r"(?:sglang_prfaas\.launch|[$`] ?sglang-prfaas|`launch) ([a-z]+)\b", text))
    assert launched <= set(COMMANDS)
    for module in set(re.findall(r"-m ((?:benchmarks|sglang_prfaas)[\w.]*)", text)):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module
    for file in set(re.findall(r"\b(?:tests|benchmarks|scripts|kernels/bench|launch)/[\w/]+\.(?:py|sh|toml)\b", text)):
        assert (ROOT / file).exists() or (ROOT / name.parent / file).exists() or "sglang_prfaas/" + file in text, file


def test_every_command_is_described() -> None:
    text = TEXTS[Path("docs/launcher.md")]
    assert [command for command in COMMANDS if f"sglang_prfaas.launch {command}" not in text] == []


def test_every_document_can_be_found_from_the_readme() -> None:
    found = {Path("README.md")}
    waiting = list(found)
    while waiting:
        name = waiting.pop()
        for link in re.findall(r"\]\(([^)\s#]+\.md)", TEXTS.get(name, "")):
            target = (ROOT / name.parent / link).resolve() if "://" not in link else None
            if target is not None and target.exists() and target.relative_to(ROOT) not in found:
                found.add(target.relative_to(ROOT))
                waiting.append(target.relative_to(ROOT))
    assert set(TEXTS) <= found
