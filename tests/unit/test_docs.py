"""The documents name only what there is: files, headings, modules, commands, keys of the configuration, variables."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from sglang_prfaas.config.schema import RouterConfig, SiteConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sglang_prfaas"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
HOMES = (ROOT, PACKAGE, ROOT / "kernels" / "prfaas_kernels")
"""Where a path in a document may begin, beside the document's own folder."""
OUTPUTS = {"kernels/bench/results"}
"""Written by a command, and not there before."""
FILE_ENDINGS = {"key", "crt", "toml", "json", "jsonl", "py", "md", "log", "sh"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
QUOTED = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")

Keys = Mapping[str, Any]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=DOCUMENTS, ids=identify)
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text())


# --- what there is ----------------------------------------------------------------------------------------------------


def headings(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ +(.+)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py", path / "__main__.py"):
        if candidate.exists():
            return candidate
    return None


def defined_in(path: Path) -> set[str]:
    """The names at a module's top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                found.add(node.name)
            case ast.Assign():
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.ImportFrom() | ast.Import():
                found |= {(alias.asname or alias.name) for alias in node.names}
    return found


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of this repository, or something that one defines."""
    name = name if name.startswith(("sglang_prfaas.", "benchmarks.", "tests.")) else f"sglang_prfaas.{name}"
    if module_file(name):
        return True
    module, _, attribute = name.rpartition(".")
    path = module_file(module)
    return path is not None and attribute in defined_in(path)


def keys_of(kind: type[msgspec.Struct]) -> Keys:
    """The keys of a table; a table of its own, or a list of tables, holds its keys."""
    return {name: keys_within(hint) for name, hint in get_type_hints(kind).items()}


def keys_within(hint: Any) -> Keys | None:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return keys_of(hint)
    return next((keys for item in get_args(hint) if (keys := keys_within(item))), None)


FILES: tuple[Keys, ...] = (keys_of(SiteConfig), keys_of(RouterConfig))
TABLES = {table for file in FILES for table in file}


def has_key(file: Keys, parts: list[str]) -> bool:
    """Whether a file may hold a key. Capitals and `*` stand for the name of one of several tables."""
    at: Keys | None = file
    for part in parts:
        if part == "*" or part.isupper():
            continue
        if at is None or part not in at:
            return False
        at = at[part]
    return True


def strange_keys(table: Mapping[str, Any], keys: Keys | None, path: str) -> Iterator[str]:
    """Keys of a TOML table that the configuration does not have; a table that is not ours is passed over."""
    if keys is None:
        return
    for key, value in table.items():
        if key not in keys:
            yield f"{path}.{key}"
        else:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    yield from strange_keys(item, keys[key], f"{path}.{key}")


# --- what the documents name ------------------------------------------------------------------------------------------


def test_links_lead_somewhere(document: Path) -> None:
    wrong = []
    for target in LINK.findall(prose(document)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and anchor not in headings(path)):
            wrong.append(target)
    assert not wrong


def test_paths_exist(document: Path) -> None:
    tops = {path.name for home in HOMES for path in home.iterdir() if path.is_dir() and path.name[0] not in "._"}
    text = document.read_text()
    named = [word for word in QUOTED.findall(prose(document)) if re.fullmatch(r"\w+/[\w./-]*", word)]
    named += re.findall(r"(?<![\w./-])(?:tests|docs|scripts|launch/(?:datacenters|profiles))/[\w./-]*\w", text)
    wrong = [
        name
        for name in named
        if name.split("/")[0] in tops and name not in OUTPUTS
        if not any((home / name).exists() for home in (*HOMES, document.parent))
    ]
    assert not wrong


def test_commands_exist(document: Path) -> None:
    text = document.read_text()
    modules = set(re.findall(r"python3? -m ((?:sglang_prfaas|benchmarks|tests)[\w.]*\w)", text))
    assert not [name for name in modules if not module_file(name)]
    launch = (PACKAGE / "launch" / "__main__.py").read_text()
    commands = set(re.findall(r"sglang_prfaas\.launch ([a-z]+)|`launch ([a-z]+)", text))
    assert not [name for pair in commands for name in pair if name and f'"{name}"' not in launch]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.M)) <= targets


def test_modules_and_keys_exist(document: Path) -> None:
    parts = {path.stem for path in PACKAGE.iterdir()}
    wrong = []
    for word in QUOTED.findall(prose(document)):
        names = word.split(".")
        if not re.fullmatch(r"[a-z]\w*(\.(\w+|\*))+", word) or names[-1] in FILE_ENDINGS:
            continue
        if names[0] in TABLES and any(has_key(file, names) for file in FILES):
            continue
        if names[0] in TABLES | parts | {"sglang_prfaas", "benchmarks"} and not is_module(word):
            wrong.append(word)
    assert not wrong


def test_examples_hold_known_keys(document: Path) -> None:
    wrong = []
    for language, block in FENCE.findall(document.read_text()):
        if language == "toml":
            ours = {name: table for name, table in tomllib.loads(block).items() if name in TABLES}
            found = [list(strange_keys(ours, file, "")) for file in FILES if ours.keys() <= file.keys()]
            assert found, f"no file has all of {', '.join(ours)}"
            fewest = min(found, key=len)
            wrong += fewest
    assert not wrong


def test_environment_variables_exist(document: Path) -> None:
    named = set(re.findall(r"\bPRFAAS_[A-Z_]*[A-Z]\b", document.read_text()))
    places = (PACKAGE, ROOT / "kernels", ROOT / "tests")
    sources = "\n".join(path.read_text() for place in places for path in place.rglob("*.py"))
    keys = {f"PRFAAS_{key.upper()}" for key in FILES[0]["transport"]}
    assert not [name for name in named if name not in keys and not re.search(rf"\b{name}\b", sources)]
