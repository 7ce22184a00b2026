"""SGLang's KVArgs as a layout, a memory and indices."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_prfaas.errors import LocalError
from sglang_prfaas.sglang_plugin.kv_pages import (
    buffers_of_layers,
    component_indices,
    flat_indices,
    layout_of,
    memory_of,
    model_identity,
)
from sglang_prfaas.transport.layout import Sharding, differences


class Kind(enum.Enum):
    MAMBA = "mamba"
    SWA = "swa"


def _buffers(*shapes: tuple[int, int]) -> tuple[list[np.ndarray[Any, Any]], list[int], list[int], list[int]]:
    arrays = [np.arange(slots * size, dtype=np.uint8).reshape(slots, size) for slots, size in shapes]
    return arrays, [a.ctypes.data for a in arrays], [a.nbytes for a in arrays], [size for _, size in shapes]


def _kv_args() -> tuple[Any, list[Any]]:
    kv, kv_ptrs, kv_lens, kv_items = _buffers((8, 6), (8, 6))
    state, st_ptrs, st_lens, st_items = _buffers((4, 10))
    aux, aux_ptrs, aux_lens, aux_items = _buffers((3, 8))
    args = SimpleNamespace(
        kv_data_ptrs=kv_ptrs,
        kv_data_lens=kv_lens,
        kv_item_lens=kv_items,
        kv_layer_ids=[3, 7],
        kv_cache_dtype_str="float16",
        kv_layout=None,
        swa_kv_cache_layout=None,
        page_size=2,
        gpu_id=0,
        state_types=[Kind.MAMBA],
        state_data_ptrs=[st_ptrs],
        state_data_lens=[st_lens],
        state_item_lens=[st_items],
        state_dim_per_tensor=[[]],
        state_slice_outer_counts=[[]],
        state_conv_shard_groups=[[]],
        aux_data_ptrs=aux_ptrs,
        aux_data_lens=aux_lens,
        aux_item_lens=aux_items,
    )
    return args, [*kv, *state, *aux]


def test_layout_and_memory_have_the_same_order() -> None:
    args, arrays = _kv_args()
    layout = layout_of(args, "model-1", 2)
    assert [c.name for c in layout.components] == ["kv", "mamba", "aux"]
    assert layout.components[0].item_bytes == (6, 6)
    assert (layout.page_tokens, layout.tp_size, layout.layer_ids) == (2, 2, (3, 7))
    memory = memory_of(args, "cpu")
    out = np.zeros(10, dtype=np.uint8)
    memory.components[1][0].gather(np.array([2]), 0, 0, out)
    assert (out == arrays[2][2]).all()
    memory.components[2][0].scatter(np.array([1]), 0, 0, np.full(8, 9, dtype=np.uint8))
    assert (arrays[3][1] == 9).all()


def test_windows_are_divided_by_their_own_heads() -> None:
    args, arrays = _kv_args()
    args.state_types, args.swa_kv_cache_layout = [Kind.SWA], "nhd"
    args.kv_item_lens, args.state_item_lens = [32, 32], [[24]]
    kv, window, _ = layout_of(args, "model-1", 2, 0, 4, 6).components
    assert kv.shardings == (Sharding(2, 2, (4,), 8),)
    assert window.shardings == (Sharding(1, 2, (6,), 4),)
    args.swa_kv_cache_layout = "hnd"
    assert layout_of(args, "model-1", 2, 0, 4, 6).components[1].shardings == ()
    assert arrays


def test_another_device_is_refused() -> None:
    args, arrays = _kv_args()
    with pytest.raises(LocalError, match="SGLang runs on 'npu'"):
        memory_of(args, "npu")
    assert arrays


def test_layouts_of_two_models_differ_in_one_line() -> None:
    args, arrays = _kv_args()
    found = differences(layout_of(args, "a", 1), layout_of(args, "b", 1))
    assert found == ["model: prefill has a, decode has b"]
    assert arrays


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, []),
        ([], []),
        (np.array([3, 1], dtype=np.int32), [3, 1]),
        ([np.array([4])], [4]),
        ([np.array(4)], [4]),
        ([5], [5]),
        ([np.array([1, 2]), np.array([7])], [1, 2, 7]),
    ],
)
def test_indices_in_all_of_sglangs_forms(values: Any, expected: list[int]) -> None:
    flat = flat_indices(values)
    assert flat.dtype == np.int64
    assert flat.tolist() == expected


def test_one_vector_for_each_component() -> None:
    vectors = component_indices(np.array([1, 2]), [[np.array([3])], None], 5)
    assert [v.tolist() for v in vectors] == [[1, 2], [3], [], [5]]


def test_a_model_is_the_same_at_two_paths_and_in_two_precisions() -> None:
    def config(**values: Any) -> Any:
        return SimpleNamespace(architectures=["KimiLinear"], model_type="kimi", to_dict=lambda: values)

    one = model_identity(config(_name_or_path="/a", hidden_size=8, torch_dtype="bfloat16"))
    assert one == model_identity(config(_name_or_path="/b", hidden_size=8, quantization_config={"bits": 8}))
    assert one != model_identity(config(_name_or_path="/a", hidden_size=16))
    assert one.startswith("KimiLinear-")


class Pool:
    def __init__(self, buffers: int, **values: Any) -> None:
        self.buffers = buffers
        self.__dict__.update(values)

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        return [0] * self.buffers, [0] * self.buffers, [0] * self.buffers


def test_which_buffers_a_layer_writes() -> None:
    assert buffers_of_layers(Pool(2), [3, 7]) == {3: [0], 7: [1]}
    assert buffers_of_layers(Pool(4), [3, 7, 3, 7]) == {3: [0, 2], 7: [1, 3]}
    assert buffers_of_layers(Pool(3, start_layer=0, layer_num=3), []) == {0: [0], 1: [1], 2: [2]}
    assert buffers_of_layers(Pool(4, start_layer=8, layer_num=2), []) == {8: [0, 2], 9: [1, 3]}
    window = {0: (0, True), 1: (1, False), 2: (1, True), 3: (0, False)}
    assert buffers_of_layers(Pool(4, layers_mapping=window), []) == {3: [0, 2], 1: [1, 3]}


def test_buffers_that_no_layer_can_be_told_of() -> None:
    assert buffers_of_layers(Pool(5, start_layer=0, layer_num=2), []) == {}
    assert buffers_of_layers(Pool(2), [3]) == {}
    assert buffers_of_layers(Pool(2, layers_mapping={0: (0, True)}), []) == {}
