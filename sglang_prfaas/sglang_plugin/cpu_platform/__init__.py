"""Entry point `sglang.srt.platforms`, name `prfaas_cpu`: SGLang on a machine without a GPU.

Chosen with ``SGLANG_PLATFORM=prfaas_cpu``; what it replaces and why stands in ``hooks.py`` and
``docs/cpu_platform.md``.
"""

from __future__ import annotations

import os

PLATFORM_NAME = "prfaas_cpu"
PLATFORM_CLASS = "sglang_prfaas.sglang_plugin.cpu_platform.platform.PrfaasCpuPlatform"


def activate() -> str | None:
    """The platform's class path when ``SGLANG_PLATFORM`` names it, else None; then nothing is imported or changed.

    SGLang calls every installed platform when the variable is unset, so silence is what keeps GPUs in use.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    from sglang_prfaas.sglang_plugin.cpu_platform import torch_shims

    torch_shims.install()
    return PLATFORM_CLASS
