"""The import rule: layers import downwards only, and the pure half knows nothing of sockets, devices or SGLang."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sglang_prfaas"
KERNELS = ROOT / "kernels" / "prfaas_kernels"

LAYERS = (
    {"launch"},
    {"sglang_plugin", "router", "site", "simulate", "profiler", "tiny_models"},
    {"http", "transport", "monitor", "store"},
    {"scheduler", "prefix_cache"},
    {"config", "core", "env"},
    {"errors", "clock"},
)
"""From the top down. A part may import the parts of the layers below its own."""

SIDEWAYS = {("env", "config"), ("config", "env"), ("sglang_plugin", "tiny_models"), ("tiny_models", "sglang_plugin")}
"""Imports within a layer that are meant, as (importer, imported)."""

PURE = {"scheduler", "prefix_cache", "config", "core", "env", "errors", "clock"}
NOT_PURE = {
    "sglang",
    "torch",
    "triton",
    "zmq",
    "httptools",
    "uvloop",
    "transformers",
    "tokenizers",
    "asyncio",
    "socket",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNEL_SOURCES = sorted(KERNELS.rglob("*.py"))


def imported_modules(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Every module that a file imports, anywhere in it. Relative imports are made absolute."""
    inside = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [*inside[: len(inside) - node.level]] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of the package that a module belongs to, None for other packages and the package itself."""
    names = module.split(".")
    known = {part for layer in LAYERS for part in layer}
    return names[1] if names[0] == "sglang_prfaas" and len(names) > 1 and names[1] in known else None


def rank(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_layers_import_downwards(path: Path) -> None:
    importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if importer == "__init__":
        assert not [module for module in imported_modules(path) if part_of(module)], "the top imports no part"
        return
    wrong = [
        module
        for module in imported_modules(path)
        if (part := part_of(module)) and part != importer
        if (importer, part) not in SIDEWAYS and rank(part) <= rank(importer)
    ]
    assert not wrong, f"{importer} must not import {wrong}: imports run {' -> '.join(map(str, map(sorted, LAYERS)))}"


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_only_the_plugin_imports_sglang(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "sglang_plugin"):
        return
    assert "sglang" not in {module.split(".")[0] for module in imported_modules(path)}


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_the_lower_half_is_pure(path: Path) -> None:
    if path.relative_to(PACKAGE).with_suffix("").parts[0] not in PURE:
        return
    found = {module.split(".")[0] for module in imported_modules(path)} & NOT_PURE
    assert not found, f"imports {sorted(found)}"


PROTOCOL_CORE = {
    *("admission", "framing", "health", "incoming_transfer", "layout", "link_estimator", "mailbox", "messages"),
    *("outbox", "outgoing_transfer", "pacing", "paging", "receive_lane", "reshape", "rooms", "send_lane", "sharing"),
    *("streams", "transfer", "views"),
}
"""Of `transport`: bytes and events in, bytes and actions out. They are given a clock, and have locks."""


@pytest.mark.parametrize("name", sorted(PROTOCOL_CORE))
def test_the_protocol_core_has_no_sockets(name: str) -> None:
    path = PACKAGE / "transport" / f"{name}.py"
    found = {module.split(".")[0] for module in imported_modules(path)} & {*NOT_PURE, "time", "ssl", "select"}
    assert found <= {"torch", "numpy", "threading"}, f"imports {sorted(found)}"
    ours = {module.split(".")[-1] for module in imported_modules(path) if ".transport." in module}
    assert not ours & {"data_tcp", "loop", "acceptor", "send_data", "receive_data"}


RUNS_WHAT_IT_READS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle"}
"""Reading the bytes of a peer with one of these is running its code (sglang#21435)."""
READERS_THAT_PICKLE = {"recv_pyobj", "send_pyobj"}


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_no_pickle(path: Path) -> None:
    found = {module.split(".")[0] for module in imported_modules(path)} & RUNS_WHAT_IT_READS
    assert not found, f"imports {sorted(found)}; msgspec reads data and nothing else"
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & READERS_THAT_PICKLE
    assert "multiprocessing.connection" not in "".join(imported_modules(path)), "its connections pickle"


def test_every_part_has_a_layer() -> None:
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in SOURCES} - {"__init__"}
    assert parts <= {part for layer in LAYERS for part in layer}


@pytest.mark.parametrize("folder", ["kernels", "launch"])
def test_top_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"a package named {folder} would shadow another one"


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=identify)
def test_kernels_stand_alone(path: Path) -> None:
    allowed = {"torch", "triton", "prfaas_kernels", *sys.stdlib_module_names}
    found = {module.split(".")[0] for module in imported_modules(path, ROOT / "kernels")} - allowed
    assert not found, f"imports {sorted(found)}; kernels may import torch, triton and the standard library only"
