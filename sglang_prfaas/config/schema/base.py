"""What all parts share: the base struct, names, ports and modes that several parts have."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Port = Annotated[int, Meta(ge=1, le=65535)]
OptionalPort = Annotated[int, Meta(ge=0, le=65535)]
"""A port, or 0 for none or any."""
SiteRole = Literal["prfaas", "pd"]
ServerRole = Literal["prefill", "decode"]
SecurityMode = Literal["auto", "keys", "off"]
CodecName = Literal["raw", "fp8", "int8", "shuffle"]


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: frozen, keyword-only, unknown keys refused with their path."""
