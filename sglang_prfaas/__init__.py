"""Prefill-as-a-Service for SGLang: cross-datacenter prefill over TCP."""

__version__ = "0.1.0"
