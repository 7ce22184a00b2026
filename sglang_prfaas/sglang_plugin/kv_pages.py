"""SGLang's `KVArgs` as a layout and a memory of the mover.

Components in order: `kv` (full-attention pages), one per state type of the model (recurrent and convolution state,
window pages, ...), and `aux` (the metadata buffers: first token, logprobs, room).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from sglang_prfaas.errors import LocalError
from sglang_prfaas.sglang_plugin.shardings import page_shardings, state_shardings
from sglang_prfaas.transport.device_memory import TorchBuffer
from sglang_prfaas.transport.layout import Component, Layout, Sharding
from sglang_prfaas.transport.memory import Buffer, HostBuffer, Indices, RankMemory
from sglang_prfaas.transport.paging import WINDOWS
from sglang_prfaas.transport.reshape import AUX

KV = 0
"""Index of the full-attention component."""

_NOT_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config")


def model_identity(hf_config: Any) -> str:
    """Architecture and a digest of a Hugging Face configuration, without what may differ between two sites."""
    values = {k: v for k, v in hf_config.to_dict().items() if k not in _NOT_PART_OF_A_MODEL}
    text = json.dumps(values, sort_keys=True, default=str)
    architecture = (getattr(hf_config, "architectures", None) or [hf_config.model_type])[0]
    return f"{architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def kv_dtype(kv_args: Any, model_dtype: Any) -> str:
    """Name of the dtype of full-attention KVCache; that of the model where SGLang was not told otherwise."""
    name = str(kv_args.kv_cache_dtype_str)
    return str(model_dtype).removeprefix("torch.") if name == "auto" else name


def layout_of(
    kv_args: Any,
    model: str,
    tp_size: int,
    tp_rank: int = 0,
    kv_heads: int = 0,
    window_heads: int = 0,
    *,
    model_dtype: Any = None,
) -> Layout:
    """The layout both ends compare at the handshake. kv_heads, window_heads: of the whole model's full and
    sliding-window attention, 0 for MLA. model_dtype: see `kv_dtype`."""
    kv_format = str(kv_args.kv_layout or kv_args.swa_kv_cache_layout or "")
    window_format = str(kv_args.swa_kv_cache_layout or kv_format)
    return Layout(
        model=model,
        kv_dtype=kv_dtype(kv_args, model_dtype),
        page_tokens=int(kv_args.page_size),
        tp_size=tp_size,
        kv_format=kv_format,
        layer_ids=tuple(int(layer) for layer in kv_args.kv_layer_ids or ()),
        components=(
            Component(
                "kv",
                tuple(int(n) for n in kv_args.kv_item_lens),
                page_shardings(kv_args.kv_item_lens, int(kv_args.page_size), kv_format, kv_heads, tp_size),
            ),
            *(
                Component(
                    str(kind.value),
                    tuple(int(n) for n in sizes),
                    page_shardings(sizes, int(kv_args.page_size), window_format, window_heads, tp_size)
                    if kind.value in WINDOWS
                    else state_shardings(kv_args, index, tp_size),
                )
                for index, (kind, sizes) in enumerate(zip(kv_args.state_types, kv_args.state_item_lens, strict=True))
            ),
            Component(AUX, tuple(int(n) for n in kv_args.aux_item_lens), (Sharding(len(kv_args.aux_item_lens)),)),
        ),
        tp_rank=tp_rank,
    )


def buffers_of_layers(pool: Any, layer_ids: list[int]) -> dict[int, list[int]]:
    """Buffers of the full-attention component by the layer that writes them; empty where they cannot be told.

    layer_ids: of each buffer, as SGLang gives them for hybrid pools; other pools have all keys in the order of layers,
    then all values."""
    count = len(pool.get_contiguous_buf_infos()[0])
    mapping = getattr(pool, "layers_mapping", None)
    if layer_ids:
        of_buffer = [int(layer) for layer in layer_ids]
    elif mapping is not None:
        full = sorted((at, layer) for layer, (at, is_window) in mapping.items() if not is_window)
        of_buffer = _repeated([layer for _, layer in full], count)
    else:
        of_buffer = _repeated(list(range(pool.start_layer, pool.start_layer + pool.layer_num)), count)
    if len(of_buffer) != count:
        return {}
    found: dict[int, list[int]] = {}
    for buffer, layer in enumerate(of_buffer):
        found.setdefault(layer, []).append(buffer)
    return found


def _repeated(layers: list[int], count: int) -> list[int]:
    return layers * (count // len(layers)) if layers else []


def memory_of(kv_args: Any, device: str) -> RankMemory:
    """The buffers behind `layout_of`, in the same order. `device` is SGLang's device type. Raises LocalError."""
    if device not in ("cpu", "cuda"):
        raise LocalError(f"the prfaas transfer backend moves memory of cpu and cuda, SGLang runs on {device!r}")

    def buffer(address: int, nbytes: int, item_bytes: int) -> Buffer:
        if device == "cpu":
            return HostBuffer(address, nbytes, item_bytes)
        return TorchBuffer.on_cuda(address, nbytes, item_bytes, int(kv_args.gpu_id))

    def component(ptrs: list[int], lens: list[int], items: list[int]) -> list[Buffer]:
        return [buffer(int(p), int(n), int(i)) for p, n, i in zip(ptrs, lens, items, strict=True)]

    return RankMemory(
        [
            component(kv_args.kv_data_ptrs, kv_args.kv_data_lens, kv_args.kv_item_lens),
            *(
                component(ptrs, lens, items)
                for ptrs, lens, items in zip(
                    kv_args.state_data_ptrs, kv_args.state_data_lens, kv_args.state_item_lens, strict=True
                )
            ),
            [
                HostBuffer(int(p), int(n), int(i))
                for p, n, i in zip(kv_args.aux_data_ptrs, kv_args.aux_data_lens, kv_args.aux_item_lens, strict=True)
            ],
        ]
    )


def flat_indices(values: Any) -> Indices:
    """Slot indices as SGLang hands them over (None, an array, a list of arrays or numbers) as one int64 vector."""
    if values is None:
        return np.empty(0, dtype=np.int64)
    if isinstance(values, (list, tuple)):
        parts = [np.asarray(value).reshape(-1) for value in values]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)
    return np.asarray(values).reshape(-1).astype(np.int64)


def component_indices(kv: Any, states: list[Any] | None, aux_index: int) -> list[Indices]:
    """One vector per component, in the layout's order."""
    return [flat_indices(kv), *(flat_indices(state) for state in states or []), flat_indices([aux_index])]
