"""The keys of a configuration, read off the schema: types, limits, defaults, descriptions.

One table feeds error messages, `--help`, the flags and the documentation, so that none of them can disagree with
`schema.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.inspect import (
    BoolType,
    DictType,
    Field,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    Metadata,
    StrType,
    StructType,
    Type,
)

_LETTERS_ETC = "^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Key(Struct, frozen=True):
    """One key of a configuration.

    path: where it stands, one part per table; `*` stands for an item of a list of tables or a key of a free table.
    type: what msgspec takes it for, without metadata.
    default: the default, or msgspec.NODEFAULT for a key that must be given.
    """

    path: tuple[str, ...]
    type: Type
    description: str
    default: Any

    @property
    def required(self) -> bool:
        return self.default is msgspec.NODEFAULT

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def bare(type_: Type) -> Type:
    """The type without its metadata wrapper."""
    while isinstance(type_, Metadata):
        type_ = type_.type
    return type_


def description(type_: Type) -> str:
    """The description in the type's metadata, or the empty string."""
    if isinstance(type_, Metadata):
        return str((type_.extra_json_schema or {}).get("description", "")) or description(type_.type)
    return ""


def struct_fields(kind: type[Struct]) -> dict[str, Field]:
    """The fields of a struct by the name they have in a file."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, StructType)
    return {field.encode_name: field for field in info.fields}


def default_of(field: Field) -> Any:
    """The default value of a field, or msgspec.NODEFAULT."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def keys_of(kind: type[Struct]) -> list[Key]:
    """Every leaf key of a configuration, in the order of the schema."""
    return list(_walk(kind, ()))


def _walk(kind: type[Struct], path: tuple[str, ...]) -> Iterator[Key]:
    for name, field in struct_fields(kind).items():
        type_ = bare(field.type)
        if isinstance(type_, StructType):
            yield from _walk(type_.cls, (*path, name))
        elif isinstance(type_, ListType) and isinstance(item := bare(type_.item_type), StructType):
            yield from _walk(item.cls, (*path, name, "*"))
        else:
            yield Key((*path, name), type_, description(field.type), default_of(field))


def expected(type_: Type) -> str:
    """What a value of this type looks like, in words: `a whole number from 1 to 65535`."""
    type_ = bare(type_)
    if isinstance(type_, IntType):
        return "a whole number" + _limits(type_)
    if isinstance(type_, FloatType):
        return "a number" + _limits(type_)
    if isinstance(type_, BoolType):
        return "true or false"
    if isinstance(type_, LiteralType):
        return "one of " + ", ".join(json.dumps(value) for value in type_.values)
    if isinstance(type_, StrType):
        if type_.pattern == _LETTERS_ETC:
            return f"a name (letters, digits, '.', '_', '-'; first a letter or digit; at most {type_.max_length})"
        if type_.pattern:
            return f"a string that matches {type_.pattern}"
        return "a string that is not empty" if type_.min_length else "a string"
    if isinstance(type_, ListType):
        return 'a list of strings, such as ["--mem-fraction-static", "0.8"]'
    if isinstance(type_, DictType):
        return 'a table of strings, such as { OMP_NUM_THREADS = "1" }'
    if isinstance(type_, StructType):
        return "a table"
    return "a valid value"


def example(type_: Type, default: Any) -> str:
    """A value to write, as TOML: the default where there is one, otherwise one that fits the type."""
    type_ = bare(type_)
    if default is not msgspec.NODEFAULT and default not in ("", [], {}):
        return toml_value(default)
    if isinstance(type_, IntType):
        low = type_.ge if type_.ge is not None else 0
        return "30000" if type_.le == 65535 else str(low)
    if isinstance(type_, FloatType):
        return "1.0"
    if isinstance(type_, LiteralType):
        return json.dumps(sorted(str(value) for value in type_.values)[-1])
    if isinstance(type_, ListType):
        return "[]"
    if isinstance(type_, DictType):
        return "{}"
    if isinstance(type_, StrType) and type_.pattern == "^https?://":
        return '"http://127.0.0.1:30000"'
    return '"..."'


def toml_value(value: Any) -> str:
    """A scalar, list or table of strings as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def metavar(type_: Type) -> str:
    """How `--help` names a value of this type."""
    type_ = bare(type_)
    if isinstance(type_, BoolType):
        return "{true,false}"
    if isinstance(type_, LiteralType):
        return "{" + ",".join(str(value) for value in type_.values) + "}"
    if isinstance(type_, IntType):
        return "N"
    if isinstance(type_, FloatType):
        return "X"
    if isinstance(type_, ListType):
        return "ARGS"
    if isinstance(type_, DictType):
        return "TABLE"
    return "TEXT"


def _limits(type_: IntType | FloatType) -> str:
    low, high, above = type_.ge, type_.le, type_.gt
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    if low is not None:
        return f" of at least {_number(low)}"
    if above is not None:
        return f" above {_number(above)}" + (f" and at most {_number(high)}" if high is not None else "")
    return f" of at most {_number(high)}" if high is not None else ""


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)
