"""Configuration: schema, reading, flags, checks."""

from sglang_prfaas.config.schema import RouterConfig, SiteConfig, TransportConfig

__all__ = ["RouterConfig", "SiteConfig", "TransportConfig"]
