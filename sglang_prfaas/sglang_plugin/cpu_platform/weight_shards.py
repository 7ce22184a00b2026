"""Which part of a whole parameter a tensor-parallel rank holds, by the SGLang layer that it belongs to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Division(NamedTuple):
    """A parameter is cut along `axis`, section by section: (size in the whole, size on a rank) of each. A section of
    one size in both is the same on every rank."""

    axis: int
    sections: tuple[tuple[int, int], ...]


def division(module: Any, leaf: str, shape: torch.Size, width: int) -> Division | None:
    """How the parameter `leaf` of `module`, of `shape` on a rank, is divided among `width` ranks; None: not at all."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if leaf in ("A_log", "dt_bias"):
        axis = 2 if len(shape) == 4 else 0  # heads: [1, 1, H, 1] in Kimi Linear, [H] elsewhere
        return Division(axis, ((shape[axis] * width, shape[axis]),))
    if "FusedMoE" in kinds and leaf in ("w13_weight", "w2_weight"):
        local = int(module.intermediate_size_per_partition)
        whole = local * int(module.moe_tp_size)
        return Division(1, ((whole, local),) * 2) if leaf == "w13_weight" else Division(2, ((whole, local),))
    if "MergedColumnParallelRepeatedLinear" in kinds:
        divided = int(module.num_column_parallel)
        sizes = [int(size) for size in module.output_partition_sizes]
        return Division(0, tuple((n * width if at < divided else n, n) for at, n in enumerate(sizes)))
    if "ColumnParallelBatchedLinear" in kinds:
        return Division(1, ((shape[1] * width, shape[1]),))
    if "QKVParallelLinear" in kinds:
        heads, kv_heads = int(module.total_num_heads), int(module.total_num_kv_heads)
        whole_sizes = heads * module.head_size, kv_heads * module.head_size, kv_heads * module.v_head_size
        locals_ = module.q_proj_shard_size, module.kv_proj_shard_size, module.v_proj_shard_size
        return Division(0, tuple(zip(whole_sizes, locals_, strict=True)))
    if "MergedColumnParallelLinear" in kinds:
        return _equal_parts(0, [int(size) for size in module.output_sizes], shape)
    if "ColumnParallelLinear" in kinds:
        return _equal_parts(0, [int(module.output_size)], shape)
    if "RowParallelLinear" in kinds:
        return _equal_parts(1, [int(module.input_size)], shape) if len(shape) > 1 else None
    if "VocabParallelEmbedding" in kinds:
        return _equal_parts(0, [int(module.num_embeddings_padded)], shape)
    return None


def _equal_parts(axis: int, sizes: list[int], shape: torch.Size) -> Division:
    """Sections that are all divided among as many ranks: as many as the size on one of them tells."""
    ranks = sum(sizes) // shape[axis]
    return Division(axis, tuple((size, size // ranks) for size in sizes))


def whole_shape(shape: torch.Size, divided: Division | None) -> torch.Size:
    """The shape of the whole parameter."""
    if divided is None:
        return shape
    sizes = list(shape)
    sizes[divided.axis] = sum(whole for whole, _ in divided.sections)
    return torch.Size(sizes)


def part_of(whole: torch.Tensor, divided: Division | None, width: int, rank: int) -> torch.Tensor:
    """What rank `rank` of `width` holds of the whole parameter."""
    if divided is None:
        return whole
    parts, start = [], 0
    for size, local in divided.sections:
        at = start + rank * (size // local) // width * local
        parts.append(whole.narrow(divided.axis, at, local))
        start += size
    return torch.cat(parts, divided.axis)
