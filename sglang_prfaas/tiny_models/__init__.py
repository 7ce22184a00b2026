"""Tiny models made on the spot, one per family of attention; nothing is downloaded.

``make_tiny_model(family, directory)`` writes config and tokenizer; weights are drawn when a server starts
(``--load-format dummy``), the same in every server. ``cpu_server_args`` and ``cpu_server_env`` say how to serve one
on a machine without a GPU.
"""

from sglang_prfaas.tiny_models.adapter import adapter_args, make_tiny_adapter
from sglang_prfaas.tiny_models.build import make_tiny_model
from sglang_prfaas.tiny_models.families import FAMILIES, FamilySpec, cpu_server_args, cpu_server_env, family_spec

__all__ = [
    "FAMILIES",
    "FamilySpec",
    "adapter_args",
    "cpu_server_args",
    "cpu_server_env",
    "family_spec",
    "make_tiny_adapter",
    "make_tiny_model",
]
