"""LoRA adapters on a CPU: `--lora-backend torch_native`, without page-locked memory and beside dummy weights.

SGLang's LoRA layers and its torch backend make small tensors in page-locked memory, whatever the device: that takes an
NVIDIA driver. Here they are plain host memory, which is where the model's are.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch

PINNING_MODULES = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")
"""They pass `pin_memory=True` to torch's factories, and call `Tensor.pin_memory`."""
_FACTORIES = ("empty", "full", "ones", "tensor", "zeros")


class UnpinnedTorch(types.ModuleType):
    """`torch` as one of these modules sees it: its factories take `pin_memory` and leave it aside."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _unpinned(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _unpinned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return factory(*args, **kwargs)

    return make


def pin_memory(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    """`Tensor.pin_memory` where there is nothing to lock pages for: the tensor itself."""
    return tensor


def initialize_weights(self: Any) -> None:
    """`LoRAAdapter.initialize_weights`, which reads an adapter's files as `--load-format` says of the model's. An
    adapter has files also where the model's weights are dummies."""
    from sglang.srt.configs.load_config import LoadFormat

    if self.load_config.load_format == LoadFormat.DUMMY:
        self.load_config = dataclasses.replace(self.load_config, load_format=LoadFormat.AUTO)
    type(self).initialize_weights.prfaas_cpu_original(self)


def install() -> None:
    """Give SGLang's LoRA modules plain memory. Idempotent."""
    for name in PINNING_MODULES:
        module = importlib.import_module(name)
        if not isinstance(module.torch, UnpinnedTorch):
            module.torch = UnpinnedTorch()
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign,assignment]
