"""Flags for every key of a configuration: `--policy.threshold_tokens 2000`, `--servers.prefill-0.port 30001`.

A flag is the key's path in the file with a dot between its parts; an item of a list of tables is addressed by its name
or its index, and a name that is not there yet adds an item. Lists of strings take one shell-quoted string
(`--site.args "--dtype float16"`) or a TOML array; tables of strings take one key (`--site.env.OMP_NUM_THREADS 1`) or a
TOML inline table.
"""

from __future__ import annotations

import copy
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.inspect import BoolType, DictType, FloatType, IntType, ListType, StructType, Type

from sglang_prfaas.config import keys
from sglang_prfaas.config.decode import Path, item_label
from sglang_prfaas.errors import ConfigError


class Override(NamedTuple):
    """One flag: the dotted path without its dashes, and the text that came with it."""

    path: str
    text: str


def split(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Take the configuration flags (those with a dot) out of a command line.

    Returns what is left, and the flags in order. Raises ConfigError for a flag without a value.
    """
    rest: list[str] = []
    overrides: list[Override] = []
    items = iter(argv)
    for item in items:
        flag, equals, text = item.partition("=")
        if not flag.startswith("--") or "." not in flag:
            rest.append(item)
            continue
        if not equals:
            try:
                text = next(items)
            except StopIteration:
                raise ConfigError(f"{flag}: a value is missing; write {flag} VALUE or {flag}=VALUE") from None
        overrides.append(Override(flag[2:], text))
    return rest, overrides


def apply(
    raw: Mapping[str, Any], kind: type[Struct], overrides: Sequence[Override]
) -> tuple[dict[str, Any], set[Path]]:
    """A copy of `raw` with the flags written over it, and the paths they set.

    Values are parsed as the schema's types; a text that is none is kept, so that `decode` reports it like one of the
    file. Unknown keys are kept for the same reason. Raises ConfigError for a path that leads nowhere.
    """
    result = copy.deepcopy(dict(raw))
    paths: set[Path] = set()
    problems: list[str] = []
    for override in overrides:
        try:
            paths.add(_set(result, kind, override))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return result, paths


def _set(table: dict[str, Any], kind: type[Struct], override: Override) -> Path:
    """Write one flag into the tables; returns the path as messages write it."""
    parts = override.path.split(".")
    done: list[str] = []
    while True:
        name, parts = parts[0], parts[1:]
        field = keys.struct_fields(kind).get(name)
        type_ = keys.bare(field.type) if field is not None else None
        done.append(name)
        if not parts:
            if isinstance(type_, StructType):
                raise ConfigError(f"--{override.path}: is a table; write --{override.path}.KEY VALUE")
            table[name] = override.text if type_ is None else _parse(override.text, type_)
            return tuple(done)
        if type_ is None or not _is_table(type_):
            raise ConfigError(f"--{override.path}: unknown key{_suggest(kind, name, parts, done)}")
        if isinstance(type_, DictType):
            table.setdefault(name, {})[".".join(parts)] = override.text
            return (*done, ".".join(parts))
        if isinstance(type_, ListType):
            item = keys.bare(type_.item_type)
            assert isinstance(item, StructType)
            label, parts = _split_label(table.get(name, []), parts, item)
            if not parts:
                raise ConfigError(f"--{override.path}: is a table; write --{override.path}.KEY VALUE")
            table, index = _item(table.setdefault(name, []), label, item, override)
            done.append(item_label(table, index))
            kind = item.cls
        else:
            assert isinstance(type_, StructType)
            table = table.setdefault(name, {})
            kind = type_.cls
        if not isinstance(table, dict):
            raise ConfigError(f"--{override.path}: {'.'.join(done)} is not a table in the file")


def _is_table(type_: Type) -> bool:
    if isinstance(type_, ListType):
        return isinstance(keys.bare(type_.item_type), StructType)
    return isinstance(type_, StructType | DictType)


def _split_label(items: Any, parts: list[str], item: StructType) -> tuple[str, list[str]]:
    """Split `prefill.0.port` into the item's label and the rest: names may hold dots."""
    known = (
        {item_label(entry, -1) for entry in items if isinstance(entry, Mapping)} if isinstance(items, list) else set()
    )
    fields = keys.struct_fields(item.cls)
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in known:
            return ".".join(parts[:length]), parts[length:]
    for length in range(1, len(parts)):
        if parts[length] in fields:
            return ".".join(parts[:length]), parts[length:]
    return parts[0], parts[1:]


def _item(items: Any, label: str, item: StructType, override: Override) -> tuple[dict[str, Any], int]:
    """The item of a list of tables that a label means, added where there is none."""
    if not isinstance(items, list) or not all(isinstance(entry, dict) for entry in items):
        raise ConfigError(f"--{override.path}: the file holds no list of tables there")
    for index, entry in enumerate(items):
        if item_label(entry, -1) == label:
            return entry, index
    if label.isdecimal() and int(label) <= len(items):
        index = int(label)
        if index == len(items):
            items.append({})
        return items[index], index
    if label.isdecimal():
        raise ConfigError(f"--{override.path}: there is no item {label}; the next new one is {len(items)}")
    name_key = "name" if "name" in keys.struct_fields(item.cls) else "to_site"
    items.append({name_key: label})
    return items[-1], len(items) - 1


def _suggest(kind: type[Struct], name: str, parts: Sequence[str], done: Sequence[str]) -> str:
    import difflib

    fields = keys.struct_fields(kind)
    close = difflib.get_close_matches(name, fields, n=1)
    if close:
        return f"; did you mean --{'.'.join((*done[:-1], close[0], *parts))}?"
    return f"; valid here: {', '.join('--' + '.'.join((*done[:-1], field)) for field in fields)}"


def _parse(text: str, type_: Type) -> Any:
    """The text of a flag as its type; the text itself where it is none."""
    try:
        if isinstance(type_, IntType):
            return int(text)
        if isinstance(type_, FloatType):
            return float(text)
        if isinstance(type_, ListType):
            return _toml(text) if text.lstrip().startswith("[") else shlex.split(text)
        if isinstance(type_, DictType):
            return _toml(text)
        if isinstance(type_, BoolType):
            return {"true": True, "false": False}.get(text.lower(), text)
    except (ValueError, tomllib.TOMLDecodeError):
        return text
    return text


def _toml(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]


def help_text(kind: type[Struct]) -> str:
    """The `--help` text of every key: flag, meaning with its unit, limits, default."""
    lines: list[str] = []
    section = ""
    for key in keys.keys_of(kind):
        if key.path[0] != section:
            section = key.path[0]
            lines.append(f"\n[{section}]" if "*" not in key.path else f"\n[[{section}]]")
        flag = "--" + key.dotted.replace("*", "NAME", 1).replace("*", "NAME")
        if isinstance(key.type, DictType):
            flag += f".KEY TEXT | {flag}"
        lines.append(f"  {flag} {keys.metavar(key.type)}")
        lines.append(f"      {key.description} {_note(key)}")
    return "\n".join(lines).lstrip("\n")


def _note(key: keys.Key) -> str:
    note = "required" if key.required else f"default: {_default(key)}"
    words = keys.expected(key.type)
    if isinstance(key.type, IntType | FloatType) and (" from " in words or " of " in words or " above " in words):
        note = f"{words.removeprefix('a ')}; {note}"
    return f"[{note}]"


def _default(key: keys.Key) -> str:
    value = key.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value} = {value >> 20} MiB"
    if isinstance(value, str) and value:
        return value
    return str(value) if value not in ("", [], {}) else "empty"
