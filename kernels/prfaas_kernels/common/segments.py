"""Whether a scan runs in segments, and the launches that find where each segment starts."""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple

import torch

from prfaas_kernels.common.chunk_table import CHUNK, ChunkTable, build_chunk_table
from prfaas_kernels.common.precision import Precision
from prfaas_kernels.common.segment_scan import segment_merge_kernel, segment_pass_kernel
from prfaas_kernels.common.tuning import Settings

logger = logging.getLogger(__name__)

#: An H200's, for the interpreter: there the same shapes take the same path as on the target.
H200_MULTIPROCESSORS = 132


class SegmentPlan(NamedTuple):
    """``chunks``: chunks in a segment, 0 where the scan stays serial; ``reason`` says why."""

    chunks: int
    reason: str


class Segments(NamedTuple):
    """``table`` of segments (its ``chunks`` are segments), ``starts`` ``[segments, H, K, V]`` float32."""

    table: ChunkTable
    starts: torch.Tensor
    chunks: int


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; an H200's on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return H200_MULTIPROCESSORS


def plan_segments(
    *, tokens: int, sequences: int, heads: int, blocks: int, slots: int, settings: Settings, longest: int | None = None
) -> SegmentPlan:
    """The rule. ``blocks``: programs per (sequence, head) of the scan; ``slots``: programs that run at once.

    A segment is long enough that all segments together just fill the GPU. Segments cost about three of their own
    wall times (b and M, merge, second run), so they pay where the longest sequence's chain is at least
    ``settings.segment_ratio`` segments long. ``longest`` tokens; None: the mean, the least that it can be.
    """
    longest = -(-tokens // max(sequences, 1)) if longest is None else longest
    if longest < settings.segment_min_tokens:
        return SegmentPlan(0, f"the longest sequence has {longest} tokens, under {settings.segment_min_tokens}")
    chain = -(-longest // CHUNK)
    fill = -(-tokens // CHUNK) / max(1, slots // (heads * blocks))
    step = settings.segment_step
    chunks = max(step, math.ceil(fill / step) * step)
    size = f"a chain of {chain} chunks against segments of {chunks} ({heads} heads, {slots} programs at once)"
    if chain < settings.segment_ratio * chunks:
        return SegmentPlan(0, f"{size}: under {settings.segment_ratio} times")
    return SegmentPlan(chunks, f"{size}: at least {settings.segment_ratio} times")


#: (operator, segmented, heads) that were logged at INFO.
_seen: set[tuple[str, bool, int]] = set()


def log_plan(operator: str, heads: int, plan: SegmentPlan) -> None:
    """INFO the first time that ``operator`` with ``heads`` heads is planned either way, DEBUG later."""
    case = (operator, plan.chunks > 0, heads)
    level = logging.DEBUG if case in _seen else logging.INFO
    _seen.add(case)
    logger.log(level, "%s scans %s: %s", operator, "in segments" if plan.chunks else "serially", plan.reason)


def find_starts(
    *,
    kg: torch.Tensor,
    w: torch.Tensor | None,
    u: torch.Tensor,
    decay: torch.Tensor,
    pool: torch.Tensor,
    pool_strides: tuple[int, int, int, int],
    slots: torch.Tensor,
    warm: torch.Tensor | None,
    table: ChunkTable,
    total_tokens: int,
    segment_chunks: int,
    value_width: int,
    precision: Precision,
    settings: Settings,
) -> Segments:
    """States at the start of every segment. ``kg``, ``w`` ``[chunks, H, C, K]``; ``u`` ``[chunks, H, C, V]``, without
    W ``v`` ``[T, H, V]``; ``pool_strides``: of slot, head, key and value in ``pool``, which is only read.
    """
    heads, width = kg.shape[1], kg.shape[3]
    block = min(settings.scan_block, value_width, width)
    segments = build_chunk_table(table.cu_seqlens, total_tokens, segment_chunks * CHUNK)
    square = () if w is None else (width,)
    maps = torch.empty(segments.bound, heads, width, *square, dtype=torch.float32, device=kg.device)
    starts = torch.empty(segments.bound, heads, width, value_width, dtype=torch.float32, device=kg.device)
    columns = value_width if w is None else value_width + width
    segment_pass_kernel[(columns // block, segments.bound * heads)](
        kg,
        w,
        u,
        decay,
        maps,
        starts,
        table.cu_seqlens,
        table.first,
        segments.chunks,
        segment_chunks,
        u.stride(0),
        u.stride(1),
        heads,
        K=width,
        V=value_width,
        C=CHUNK,
        BV=block,
        HAS_W=w is not None,
        DOT=precision.dot,
        PREC=precision.prec,
        STAGES=settings.scan_stages,
        num_warps=settings.scan_warps,
        num_stages=settings.scan_stages,
    )
    segment_merge_kernel[(value_width // block, (table.cu_seqlens.shape[0] - 1) * heads)](
        maps,
        starts,
        pool,
        slots,
        warm,
        table.cu_seqlens,
        segments.first,
        segment_chunks,
        *pool_strides,
        heads,
        K=width,
        V=value_width,
        C=CHUNK,
        BV=block,
        HAS_W=w is not None,
        HAS_WARM=warm is not None,
        MERGE_PREC=precision.merge_prec,
        num_warps=settings.merge_warps,
        num_stages=1,
    )
    return Segments(segments, starts, segment_chunks)
