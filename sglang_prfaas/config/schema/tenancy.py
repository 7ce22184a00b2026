"""`[tenancy]` and `[[tenants]]`: whose a request is, and what follows from it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from sglang_prfaas.config.schema.base import Config, Name


class TenantConfig(Config, frozen=True):
    """Clients that share a cache, and the sites that may see what they send."""

    name: Annotated[Name, Meta(description="Name of the tenant.")]
    api_keys: Annotated[
        list[str],
        Meta(description="SHA-256 in hexadecimal of each API key (Authorization: Bearer KEY) that is this tenant's."),
    ] = field(default_factory=list)
    sites: Annotated[
        list[Name], Meta(description="Sites that its requests may go to, prefill and decode. Empty: all.")
    ] = field(default_factory=list)
    cache_salt: Annotated[
        str,
        Meta(description="Salt of its prefix caches, put into every request in place of the client's. Empty: none."),
    ] = ""


class TenancyConfig(Config, frozen=True):
    """How the router knows whose a request is."""

    header: Annotated[
        str,
        Meta(description="Header with a tenant's name, for tenants without api_keys; trust what sets it. Empty: none."),
    ] = ""
    required: Annotated[bool, Meta(description="Refuse requests of no tenant (403).")] = False
