"""Environment variables of the plugin: how a launcher hands a server its part of the configuration.

Every key of `TransportConfig` has one: `PRFAAS_` and the key in capitals, `PRFAAS_CONNECTIONS=8` for `connections`.
With none set, the defaults of the schema hold, so that `python -m sglang.launch_server` works with no launcher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import msgspec

from sglang_prfaas.config.schema import CodecName, LinkConfig, TransportConfig
from sglang_prfaas.errors import ConfigError

PREFIX = "PRFAAS_"

SITE = "PRFAAS_SITE"
"""Name of the site a server belongs to; goes into logs and the transfer log."""

SERVER = "PRFAAS_SERVER"
"""Name of the server in its site."""

MOVER_PORT = "PRFAAS_MOVER_PORT"
"""Prefill only: first port of the mover, rank r listens on it plus r. 0 or unset: any free port."""

LINK_CODECS = "PRFAAS_LINK_CODECS"
"""Codecs for sites that have another than `PRFAAS_CODEC`: `SITE=CODEC`, comma separated. Unset: none."""

LINK_REPORTS = "PRFAAS_LINK_REPORTS"
"""ZeroMQ endpoint (ipc://...) of the site's agent, to which movers report what they see of links. Unset: nowhere."""

LINKS = "PRFAAS_LINKS"
"""The site's `[[links]]` as a JSON list of tables. Unset: none."""

TRANSFER_LOG = "PRFAAS_TRANSFER_LOG"
"""File that gets one JSON line for every finished transfer. Unset: none."""


def transport_to_env(transport: TransportConfig) -> dict[str, str]:
    """The environment that makes `transport_from_env` return `transport`."""
    return {PREFIX + key.upper(): str(value) for key, value in msgspec.structs.asdict(transport).items()}


def transport_from_env(environ: Mapping[str, str]) -> TransportConfig:
    """Read the transport settings. Raises ConfigError with the variable's name for a bad value."""
    raw = {
        field.name: environ[PREFIX + field.name.upper()]
        for field in msgspec.structs.fields(TransportConfig)
        if PREFIX + field.name.upper() in environ
    }
    try:
        return msgspec.convert(raw, TransportConfig, strict=False)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        name = PREFIX + path.rstrip("`").upper() if path else PREFIX + "*"
        raise ConfigError(f"{name}: {problem}, got {environ.get(name, '?')!r}") from None


def links_to_env(links: list[LinkConfig]) -> str:
    """The value of `LINKS` that makes `links_from_env` return these."""
    return msgspec.json.encode(links).decode()


def links_from_env(environ: Mapping[str, str]) -> dict[str, LinkConfig]:
    """The configured links, by the site they lead to. Raises ConfigError for a bad value."""
    text = environ.get(LINKS, "[]")
    try:
        links = msgspec.json.decode(text, type=list[LinkConfig])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{LINKS}: {error}, got {text!r}") from None
    return {link.to_site: link for link in links}


def link_codecs_to_env(links: Sequence[LinkConfig]) -> dict[str, str]:
    """The environment that makes `link_codecs_from_env` return the codecs of `links`; empty where none has one."""
    text = ",".join(f"{link.to_site}={link.codec}" for link in links if link.codec)
    return {LINK_CODECS: text} if text else {}


def link_codecs_from_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Codec by site. Raises ConfigError for anything else than `SITE=CODEC`, comma separated."""
    found = {}
    for part in filter(None, environ.get(LINK_CODECS, "").split(",")):
        site, _, codec = part.partition("=")
        if not site or codec not in get_args(CodecName):
            raise ConfigError(f"{LINK_CODECS}: expected SITE={'|'.join(get_args(CodecName))}, got {part!r}")
        found[site] = codec
    return found


def port_from_env(environ: Mapping[str, str], name: str = MOVER_PORT) -> int:
    """A port from the environment, 0 where unset. Raises ConfigError for anything else than 0 to 65535."""
    text = environ.get(name, "0")
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"{name}: expected a port from 0 to 65535, got {text!r}")
    return int(text)
