"""Reading configuration files: TOML in, frozen structs out, flags over both.

`load_site` and `load_router` raise ConfigError with one clear message per problem: what is wrong, where, and what to
write instead. Rules that span fields are in `checks` and run here too.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from msgspec import Struct

from sglang_prfaas.config import checks, flags
from sglang_prfaas.config.decode import decode
from sglang_prfaas.config.flags import Override
from sglang_prfaas.config.schema import RouterConfig, SiteConfig
from sglang_prfaas.errors import ConfigError

T = TypeVar("T", bound=Struct)

PathLike = str | os.PathLike[str]

Kind = Literal["site", "router"]


def load_site(path: PathLike | None, overrides: Sequence[Override] = (), *, check: bool = True) -> SiteConfig:
    """Read the file of one datacenter.

    path: the TOML file; None builds the configuration from flags alone.
    overrides: flags written over the file, see `flags.split`.
    check: also apply the rules that span fields.
    Raises ConfigError.
    """
    config = _load(path, SiteConfig, "site", overrides)
    if check:
        _refuse(checks.site_findings(config, name_of(path)))
    return config


def load_router(path: PathLike | None, overrides: Sequence[Override] = (), *, check: bool = True) -> RouterConfig:
    """Read the file of a router; arguments and errors as for `load_site`."""
    config = _load(path, RouterConfig, "router", overrides)
    if check:
        _refuse(checks.router_findings(config, name_of(path)))
    return config


def kind_of(path: PathLike) -> Kind:
    """Whether a file describes a site or a router, by its tables. Raises ConfigError where it is neither or both."""
    kind = _kind(read_toml(path))
    if kind is None:
        raise ConfigError(
            f"{name_of(path)}: neither a site nor a router; a site's file has [site] and [[servers]], "
            "a router's has [router] and [[sites]]"
        )
    return kind


def read_toml(path: PathLike) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError where it cannot be read or is no TOML."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{name_of(path)}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name_of(path)}: not valid TOML: {error}") from error


def name_of(path: PathLike | None) -> str:
    """How messages name a file."""
    return "" if path is None else os.fspath(path)


def _kind(raw: Mapping[str, Any]) -> Kind | None:
    site, router = "site" in raw or "servers" in raw, "router" in raw or "sites" in raw
    return None if site == router else "site" if site else "router"


def _load(path: PathLike | None, type_: type[T], kind: Kind, overrides: Sequence[Override]) -> T:
    raw = read_toml(path) if path is not None else {}
    if (there := _kind(raw)) not in (kind, None):
        raise ConfigError(f"{name_of(path)}: describes a {there}, start it with `launch {there}`; expected a {kind}")
    raw, from_flags = flags.apply(raw, type_, overrides)
    return decode(raw, type_, name_of(path), from_flags)


def _refuse(findings: Sequence[checks.Finding]) -> None:
    if problems := checks.fatal(findings):
        raise ConfigError(problems)
