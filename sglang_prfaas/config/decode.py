"""From a plain dictionary to a frozen configuration, collecting every problem with its path.

msgspec stops at the first problem; this walk goes on, so that a file with three mistakes gives three messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec.inspect import DictType, Field, ListType, LiteralType, StructType

from sglang_prfaas.config import keys
from sglang_prfaas.errors import ConfigError

T = TypeVar("T", bound=Struct)

Path = tuple[str, ...]


def decode(raw: Mapping[str, Any], kind: type[T], source: str, from_flags: Collection[Path] = ()) -> T:
    """Build `kind` from `raw`.

    source: name of the file for messages; empty where there is none.
    from_flags: paths that flags have set; their messages name the flag instead of the file.
    Raises ConfigError with one message for every problem found.
    """
    walk = _Walk(kind, source, frozenset(from_flags))
    walk.table(raw, kind, ())
    if walk.problems:
        raise ConfigError(walk.problems)
    return msgspec.convert(raw, kind)


class _Walk:
    def __init__(self, root: type[Struct], source: str, from_flags: frozenset[Path]) -> None:
        self._all_keys = keys.keys_of(root)
        self._source = source
        self._from_flags = from_flags
        self.problems: list[str] = []

    def table(self, raw: Mapping[str, Any], kind: type[Struct], path: Path) -> None:
        fields = keys.struct_fields(kind)
        misspelt: set[str] = set()
        for name in raw:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                misspelt.update(close)
                self._report((*path, name), f"unknown key{self._nearest(name, close, fields, path)}")
        annotations = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        for name, field in fields.items():
            if name in raw:
                self._value(raw[name], field, annotations[name], (*path, name))
            elif field.required and name not in misspelt:
                self._missing(field, (*path, name))

    def _value(self, value: Any, field: Field, annotation: Any, path: Path) -> None:
        type_ = keys.bare(field.type)
        if isinstance(type_, StructType):
            if isinstance(value, Mapping):
                self.table(value, type_.cls, path)
            else:
                self._report(path, f"expected a table, got {_show(value)}; write [{'.'.join(path)}] and its keys below")
        elif isinstance(type_, ListType) and isinstance(item := keys.bare(type_.item_type), StructType):
            self._tables(value, item, type_, path)
        elif isinstance(type_, DictType) and isinstance(value, Mapping):
            for name, entry in value.items():
                if not isinstance(entry, str):
                    fixed = str(entry).lower() if isinstance(entry, bool) else str(entry)
                    self._report((*path, name), f'expected a string, got {_show(entry)}; write {name} = "{fixed}"')
        else:
            self._leaf(value, field, annotation, path)

    def _tables(self, value: Any, item: StructType, type_: ListType, path: Path) -> None:
        header = f"[[{'.'.join(path)}]]"
        if not isinstance(value, list):
            self._report(path, f"expected a list of tables, got {_show(value)}; write {header} before each")
            return
        if len(value) < (type_.min_length or 0):
            self._report(path, f"is empty; add at least one {header}")
        for index, entry in enumerate(value):
            if isinstance(entry, Mapping):
                self.table(entry, item.cls, (*path, item_label(entry, index)))
            else:
                self._report((*path, str(index)), f"expected a table, got {_show(entry)}; write {header}")

    def _leaf(self, value: Any, field: Field, annotation: Any, path: Path) -> None:
        try:
            msgspec.convert(value, annotation)
        except msgspec.ValidationError:
            type_ = keys.bare(field.type)
            default = keys.default_of(field)
            hint = ""
            if isinstance(type_, LiteralType):
                close = difflib.get_close_matches(str(value), [str(v) for v in type_.values], n=1)
                hint = f'; did you mean "{close[0]}"?' if close else ""
            elif default is not msgspec.NODEFAULT and default not in ("", [], {}):
                hint = f"; write for example {path[-1]} = {keys.toml_value(default)} (the default)"
            elif isinstance(value, str) or not isinstance(default, str):
                hint = f"; write for example {path[-1]} = {keys.example(type_, default)}"
            self._report(path, f"expected {keys.expected(type_)}, got {_show(value)}{hint}")

    def _missing(self, field: Field, path: Path) -> None:
        type_ = keys.bare(field.type)
        text = keys.description(field.type)
        about = f" ({text.rstrip('.')})" if text else ""
        if isinstance(type_, StructType):
            needed = [name for name, inner in keys.struct_fields(type_.cls).items() if inner.required]
            self._report(path, f"missing; add a table [{'.'.join(path)}] with {', '.join(needed)}")
        elif isinstance(type_, ListType):
            self._report(path, f"missing; add at least one [[{'.'.join(path)}]]{about}")
        else:
            self._report(path, f"missing; write {path[-1]} = {keys.example(type_, msgspec.NODEFAULT)}{about}")

    def _nearest(self, name: str, close: list[str], fields: Mapping[str, Field], path: Path) -> str:
        """`; did you mean X?`: a close name in the same table, or else the same name in another one."""
        if close:
            return f"; did you mean {'.'.join((*path, close[0]))}?"
        elsewhere = [key.dotted for key in self._all_keys if key.path[-1] == name]
        if elsewhere:
            return f"; did you mean {elsewhere[0]}?"
        return f"; valid keys here: {', '.join(fields)}"

    def _report(self, path: Path, text: str) -> None:
        dotted = ".".join(path)
        from_flag = any(path[: len(given)] == given or given[: len(path)] == path for given in self._from_flags)
        if path in self._from_flags or (from_flag and not self._source):
            self.problems.append(f"--{dotted}: {text}")
        else:
            self.problems.append(f"{self._source}: {dotted}: {text}" if self._source else f"{dotted}: {text}")


def item_label(entry: Mapping[str, Any], index: int) -> str:
    """How messages and flags address an item of a list of tables: its name, or else its index."""
    name = entry.get("name", entry.get("to_site"))
    return name if isinstance(name, str) and name else str(index)


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table"
    text = keys.toml_value(value) if isinstance(value, str | int | float | bool | list) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
