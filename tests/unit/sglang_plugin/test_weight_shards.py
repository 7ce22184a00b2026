"""The ranks' parts of a parameter are parts of one whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_prfaas.sglang_plugin.cpu_platform.weight_shards import division, part_of, whole_shape


def layer(kind: str, base: type = object, **values: Any) -> Any:
    module = type(kind, (base,), {})()
    for key, value in values.items():
        setattr(module, key, value)
    return module


def parts(module: Any, leaf: str, local: tuple[int, ...], width: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    shape = torch.Size(local)
    divided = division(module, leaf, shape, width)
    size = whole_shape(shape, divided)
    whole = torch.arange(size.numel()).reshape(size)
    found = [part_of(whole, divided, width, rank) for rank in range(width)]
    assert all(part.shape == shape for part in found)
    return whole, found


def test_columns_and_rows() -> None:
    whole, found = parts(layer("ColumnParallelLinear", output_size=8), "weight", (4, 3), 2)
    assert torch.equal(torch.cat(found), whole)
    whole, found = parts(layer("RowParallelLinear", input_size=8), "weight", (3, 4), 2)
    assert torch.equal(torch.cat(found, 1), whole)
    whole, (left, right) = parts(layer("RowParallelLinear", input_size=8), "bias", (3,), 2)
    assert torch.equal(left, whole)
    assert torch.equal(right, whole)


def test_sections_are_divided_each_on_its_own() -> None:
    merged = layer("MergedColumnParallelLinear", output_sizes=[4, 2])
    whole, (left, right) = parts(merged, "weight", (3, 1), 2)
    assert left.flatten().tolist() == [0, 1, 4]
    assert right.flatten().tolist() == [2, 3, 5]
    repeated = layer("MergedColumnParallelRepeatedLinear", num_column_parallel=1, output_partition_sizes=[2, 3])
    whole, (left, right) = parts(repeated, "weight", (5, 1), 2)
    assert whole.shape == (7, 1)
    assert left.flatten().tolist() == [0, 1, 4, 5, 6]
    assert right.flatten().tolist() == [2, 3, 4, 5, 6]


def test_a_kv_head_that_several_ranks_have() -> None:
    qkv = layer("QKVParallelLinear", total_num_heads=4, total_num_kv_heads=2, head_size=1, v_head_size=1)
    qkv.q_proj_shard_size, qkv.kv_proj_shard_size, qkv.v_proj_shard_size = 1, 1, 1
    _, found = parts(qkv, "weight", (3, 1), 4)
    assert [part.flatten().tolist() for part in found] == [[0, 4, 6], [1, 4, 6], [2, 5, 7], [3, 5, 7]]


def test_experts_heads_and_the_rest() -> None:
    experts = layer("FusedMoE", intermediate_size_per_partition=2, moe_tp_size=2)
    _, (left, _) = parts(experts, "w13_weight", (1, 4, 1), 2)
    assert left.flatten().tolist() == [0, 1, 4, 5]
    whole, found = parts(experts, "w2_weight", (1, 1, 2), 2)
    assert torch.equal(torch.cat(found, 2), whole)
    whole, found = parts(layer("Anything"), "A_log", (1, 1, 2, 1), 2)
    assert torch.equal(torch.cat(found, 2), whole)
    batched = layer("ColumnParallelBatchedLinear")
    whole, found = parts(batched, "weight", (2, 3, 2), 2)
    assert torch.equal(torch.cat(found, 1), whole)
    assert division(SimpleNamespace(), "weight", torch.Size((2, 2)), 2) is None
