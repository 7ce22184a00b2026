"""Configuration: schema, cross-field checks, loading and overriding."""

from sglang_prfaas.config.schema import RouterConfig, SiteConfig, TransportConfig

__all__ = ["RouterConfig", "SiteConfig", "TransportConfig"]
