"""Configuration as frozen structs: every default of the project stands in this package, units in the key names.

One TOML file per datacenter (`SiteConfig`, in `site.py`) and one for the router (`RouterConfig`, in `router.py`); a
module for each part of them. Rules that span fields are in `config/checks/`, reading and overriding in
`config/load.py`. The `description` of a field is its `--help` text and its JSON Schema description.
"""

from sglang_prfaas.config.schema.agent import AgentConfig
from sglang_prfaas.config.schema.base import CodecName, Name, Port, SecurityMode, ServerRole, SiteRole
from sglang_prfaas.config.schema.links import LinkConfig
from sglang_prfaas.config.schema.policy import OrderMode, PolicyConfig, PolicyMode, RolesConfig
from sglang_prfaas.config.schema.prefix_cache import CachePeerConfig, PrefixCacheBackend, PrefixCacheConfig
from sglang_prfaas.config.schema.prefix_index import CheckpointMode, PrefixIndexConfig
from sglang_prfaas.config.schema.router import (
    ReportsConfig,
    RouterConfig,
    RouterLimits,
    RouterSection,
    RouterSite,
    TargetConfig,
)
from sglang_prfaas.config.schema.site import ServerConfig, SiteConfig, SiteLimits, SiteSection
from sglang_prfaas.config.schema.tenancy import TenancyConfig, TenantConfig
from sglang_prfaas.config.schema.transport import InnerRailKind, LayerwiseMode, TransportConfig

__all__ = [
    "AgentConfig",
    "CachePeerConfig",
    "CheckpointMode",
    "CodecName",
    "InnerRailKind",
    "LayerwiseMode",
    "LinkConfig",
    "Name",
    "OrderMode",
    "PolicyConfig",
    "PolicyMode",
    "Port",
    "PrefixCacheBackend",
    "PrefixCacheConfig",
    "PrefixIndexConfig",
    "ReportsConfig",
    "RolesConfig",
    "RouterConfig",
    "RouterLimits",
    "RouterSection",
    "RouterSite",
    "SecurityMode",
    "ServerConfig",
    "ServerRole",
    "SiteConfig",
    "SiteLimits",
    "SiteRole",
    "SiteSection",
    "TargetConfig",
    "TenancyConfig",
    "TenantConfig",
    "TransportConfig",
]
