"""Whose a request is, and where it may go."""

from __future__ import annotations

import hashlib

import msgspec

from sglang_prfaas.config.schema import RouterConfig, TenantConfig
from sglang_prfaas.core.request import RequestView
from sglang_prfaas.http import HttpError, Request
from sglang_prfaas.scheduler.types import Observation

_BEARER = b"bearer "


class Tenants:
    """The tenants of a router."""

    def __init__(self, config: RouterConfig) -> None:
        self._header = config.tenancy.header.lower().encode()
        self._required = config.tenancy.required
        self._by_key = {key.lower(): tenant for tenant in config.tenants for key in tenant.api_keys}
        self._by_name = {tenant.name: tenant for tenant in config.tenants if not tenant.api_keys}
        self._sites = {tenant.name: frozenset(tenant.sites) for tenant in config.tenants if tenant.sites}

    def of(self, request: Request) -> TenantConfig | None:
        """The tenant of a request. Raises HttpError 403 where there has to be one, or the header names none."""
        authorization = request.header(b"authorization") or b""
        if self._by_key and authorization[: len(_BEARER)].lower() == _BEARER:
            digest = hashlib.sha256(authorization[len(_BEARER) :].strip()).hexdigest()
            if (tenant := self._by_key.get(digest)) is not None:
                return tenant
        name = (request.header(self._header) or b"").decode("latin-1") if self._header else ""
        if name:
            if (tenant := self._by_name.get(name)) is None:
                raise HttpError(403, f"There is no tenant {name!r} that this header may name.", code="unknown_tenant")
            return tenant
        if self._required:
            raise HttpError(403, "The request is of no tenant; send its API key.", code="no_tenant")
        return None

    def sites(self, tenant: TenantConfig | None) -> frozenset[str] | None:
        """The sites that a tenant's requests may go to, None for all."""
        return self._sites.get(tenant.name) if tenant is not None else None


def permitted(observation: Observation, request: RequestView) -> Observation:
    """What a request may see of an observation: its sites, and of them its servers. The views are shared."""
    sites, servers = request.sites, request.servers
    if sites is None and servers is None:
        return observation
    seen = [site for site in observation.sites if sites is None or site.name in sites]
    if servers is not None:
        seen = [
            msgspec.structs.replace(site, servers=[server for server in site.servers if server.key in servers])
            for site in seen
        ]
    return Observation(
        sites=seen,
        t_tokens=observation.t_tokens,
        bandwidth_scarce=observation.bandwidth_scarce,
        links=observation.links,
        max_decode_requests=observation.max_decode_requests,
    )
