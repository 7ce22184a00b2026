"""What SGLang's LoRA modules get of torch on a CPU."""

from __future__ import annotations

import torch

from sglang_prfaas.sglang_plugin.cpu_platform.lora import UnpinnedTorch, pin_memory


def test_tensors_are_made_without_page_locked_memory() -> None:
    seen = UnpinnedTorch()
    for made in (
        seen.tensor([0, 128], dtype=torch.int32, device="cpu", pin_memory=True),
        seen.zeros((2,), dtype=torch.int32, pin_memory=True),
        seen.empty(2, dtype=torch.int32),
    ):
        assert made.dtype == torch.int32
        assert made.shape == (2,)
        assert not made.is_pinned()


def test_everything_else_is_torch() -> None:
    seen = UnpinnedTorch()
    assert seen.Tensor is torch.Tensor
    assert seen.nn is torch.nn
    tensor = torch.ones(3)
    assert pin_memory(tensor) is tensor
