"""Whether a scan runs in segments, and the launches that find where each segment starts."""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple

import torch

from prfaas_kernels.common.chunk_run import ChunkRun, StateIo
from prfaas_kernels.common.chunk_table import CHUNK, ChunkTable, build_chunk_table
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


def find_starts(run: ChunkRun, v: torch.Tensor, state: StateIo, segment_chunks: int) -> Segments:
    """States at the start of every segment; ``v`` ``[T, H, V]`` is read where there is no U. The pool is only read."""
    table, work, settings = run.table, run.work, run.settings
    width, value_width, heads = run.width, run.value_width, run.heads
    u = v if work.u is None else work.u
    block = min(settings.scan_block, value_width, width)
    segments = build_chunk_table(table.cu_seqlens, v.shape[0], segment_chunks * CHUNK)
    square = () if work.w is None else (width,)
    maps = torch.empty(segments.bound, heads, width, *square, dtype=torch.float32, device=v.device)
    starts = torch.empty(segments.bound, heads, width, value_width, dtype=torch.float32, device=v.device)
    columns = value_width if work.w is None else value_width + width
    sizes = {"K": width, "V": value_width, "C": CHUNK, "BV": block, "HAS_W": work.w is not None}
    segment_pass_kernel[(columns // block, segments.bound * heads)](
        work.kg,
        work.w,
        u,
        work.decay,
        maps,
        starts,
        table.cu_seqlens,
        table.first,
        segments.chunks,
        segment_chunks,
        *u.stride()[:2],
        heads,
        **sizes,
        DOT=run.precision.dot,
        PREC=run.precision.prec,
        STAGES=settings.scan_stages,
        num_warps=settings.scan_warps,
        num_stages=settings.scan_stages,
    )
    segment_merge_kernel[(value_width // block, (table.cu_seqlens.shape[0] - 1) * heads)](
        maps,
        starts,
        state.pool,
        state.slots,
        state.warm,
        table.cu_seqlens,
        segments.first,
        segment_chunks,
        *state.strides(state.pool),
        heads,
        **sizes,
        HAS_WARM=state.warm is not None,
        MERGE_PREC=run.precision.merge_prec,
        num_warps=settings.merge_warps,
        num_stages=1,
    )
    return Segments(segments, starts, segment_chunks)
