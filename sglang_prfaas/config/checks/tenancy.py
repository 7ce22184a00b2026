"""Rules of `[tenancy]` and `[[tenants]]`, and of the endpoints of KV events."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from sglang_prfaas.config.checks.finding import Raw, repeated
from sglang_prfaas.config.schema import RouterConfig

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def tenancy_findings(config: RouterConfig) -> Iterator[Raw]:
    """What is wrong with a router's tenants."""
    sites = {site.name: site for site in config.sites}
    for name, count in repeated(tenant.name for tenant in config.tenants):
        yield "tenants", f"{count} tenants are named {name!r}; give each a name of its own", True
    for key, count in repeated(key.lower() for tenant in config.tenants for key in tenant.api_keys):
        yield "tenants", f"the API key with digest {key[:12]}... is listed {count} times; keep one", True
    for tenant in config.tenants:
        path = f"tenants.{tenant.name}"
        if not all(map(_SHA256.fullmatch, tenant.api_keys)):
            text = "holds something that is no SHA-256 in hexadecimal; write what `printf %s KEY | sha256sum` prints"
            yield f"{path}.api_keys", text, True
        if not tenant.api_keys and not config.tenancy.header:
            text = "nothing tells its requests from others; add api_keys, or set tenancy.header"
            yield path, text, True
        for site in tenant.sites:
            if site not in sites:
                text = f"names {site!r}, which is no site of this router; it has {', '.join(sites)}"
                yield f"{path}.sites", text, True
        if tenant.sites and not any(sites[site].role == "pd" for site in tenant.sites if site in sites):
            yield f"{path}.sites", "has no pd site, so nothing could decode; add one", True
        if not tenant.cache_salt:
            text = "no cache_salt: its prefixes are shared with every client that sends none"
            yield f"{path}.cache_salt", text, False
    if config.tenancy.required and not config.tenants:
        yield "tenancy.required", "there are no tenants, so every request would be refused; add [[tenants]]", True


def kv_event_findings(config: RouterConfig) -> Iterator[Raw]:
    """What is wrong with the endpoints of KV events that a router is to subscribe to."""
    for site in config.sites:
        for server in site.servers:
            path = f"sites.{site.name}.servers.{server.name}"
            for key, endpoint in (("kv_events", server.kv_events), ("kv_replay", server.kv_replay)):
                if endpoint and not _can_be_dialled(endpoint):
                    yield f"{path}.{key}", f'{endpoint!r} cannot be dialled; write "tcp://HOST:PORT"', True
            if server.kv_replay and not server.kv_events:
                yield f"{path}.kv_replay", "is used with kv_events only; write that too, or remove it", True


def _can_be_dialled(endpoint: str) -> bool:
    if endpoint.startswith("ipc://"):
        return True
    try:
        parts = urlsplit(endpoint)
        return parts.scheme == "tcp" and parts.hostname not in (None, "*") and bool(parts.port)
    except ValueError:
        return False
