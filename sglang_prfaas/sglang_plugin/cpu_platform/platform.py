"""The platform object that SGLang asks for devices, capabilities and defaults."""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_prfaas.sglang_plugin.cpu_platform import hooks


class PrfaasCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU as an out-of-tree platform: SGLang then takes its torch-native paths instead of CUDA or AMX kernels.

    Hooks go in when a process imports the model runner, and are looked at again once its model is built: a worker
    with a hook missing stops there, so the server never becomes ready.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def init_backend(self) -> None:
        """Called while ``model_executor.model_runner`` is imported. Raises HookError; the import fails with it."""
        hooks.install_hooks()

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Called in each worker before the first forward pass. Raises HookError if a hook is no longer in place."""
        hooks.register_mla_for_torch_native()
        hooks.verify_hooks()
