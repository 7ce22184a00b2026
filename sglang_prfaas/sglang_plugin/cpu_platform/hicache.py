"""HiCache on a CPU: copies between the device pool, which is host memory here, and HiCache's host pool.

SGLang imports these copies from `sgl_kernel.kvcacheio` on CUDA only, so its host pools call names that do not exist on
a CPU. They are set here, with the semantics of the `direct` backend: no streams, the copy is done on return. Layouts:
`layer_first` [layer][token, ...] on the device, `page_first_direct` [page, layer, token of the page, ...] on the host;
indices are of tokens (of slots for recurrent state, whose pages hold one).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

POOL_HOST = "sglang.srt.mem_cache.pool_host"
HOST_MEMORY_RESERVE_BYTES = 1 << 30
"""Memory that HiCache's host pools leave free; SGLang's 10 GiB are for machines with GPUs."""


def cuda_host_register(buffer: torch.Tensor, registration_granularity_bytes: int | None = None) -> None:
    """Pinning for a GPU: nothing to do."""


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Tokens of each layer, `layer_first` on both sides."""
    for source, destination in zip(src_layers, dst_layers, strict=True):
        destination[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """One layer from the host to the device. `src_ptrs`: the host's buffers (K and V, or one), `dst_ptrs`: those of
    the layer."""
    pages, offsets = src_indices // page_size, src_indices % page_size
    for source, destination in zip(src_ptrs, dst_ptrs, strict=True):
        destination[dst_indices] = source[pages, layer_id, offsets].reshape(-1, *destination.shape[1:])


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """All layers from the device to the host. `src_ptrs`: the layers of the first host buffer, then of the next."""
    pages, offsets = dst_indices // page_size, dst_indices % page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, destination in enumerate(dst_ptrs):
        for layer, source in enumerate(src_ptrs[number * layers : (number + 1) * layers]):
            destination[pages, layer, offsets] = source[src_indices].reshape(-1, *destination.shape[3:])


MISSING: tuple[tuple[str, Callable[..., Any]], ...] = tuple(
    (f"{POOL_HOST}.{module}:{function.__name__}", function)
    for module in ("mha", "mla", "mamba")
    for function in (transfer_kv_direct, transfer_kv_per_layer_direct_pf_lf, transfer_kv_all_layer_direct_lf_pf)
)
"""Names that SGLang's modules call and, on a CPU, do not have."""


def install() -> None:
    """Set the missing names, and the reserve. Idempotent; raises AttributeError where SGLang has no such reserve."""
    base = importlib.import_module(f"{POOL_HOST}.base")
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = min(base.HICACHE_HOST_MEMORY_RESERVE_BYTES, HOST_MEMORY_RESERVE_BYTES)
    for target, function in MISSING:
        module_name, _, name = target.partition(":")
        module = importlib.import_module(module_name)
        if not hasattr(module, name):
            setattr(module, name, function)
