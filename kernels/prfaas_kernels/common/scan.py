"""Launch of the scan over chunks, serial or in segments."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_run import ChunkRun, StateIo
from prfaas_kernels.common.chunk_table import CHUNK, real_chunks
from prfaas_kernels.common.delta_inputs import DeltaInputs
from prfaas_kernels.common.segments import find_starts, log_plan, multiprocessors, plan_segments
from prfaas_kernels.common.state_scan import state_scan_kernel


def _segment_chunks(run: ChunkRun, v: torch.Tensor, operator: str, longest: int | None) -> int:
    """By :func:`prfaas_kernels.common.segments.plan_segments`; 0 for a serial scan."""
    plan = plan_segments(
        tokens=v.shape[0],
        sequences=run.table.cu_seqlens.shape[0] - 1,
        heads=run.heads,
        blocks=run.value_width // min(run.settings.scan_block, run.value_width),
        slots=multiprocessors(v.device) * run.settings.segment_programs,
        settings=run.settings,
        longest=longest,
    )
    log_plan(operator, run.heads, plan)
    return plan.chunks


def run_scan(
    run: ChunkRun,
    v: torch.Tensor,
    out: torch.Tensor,
    state: StateIo,
    *,
    operator: str,
    segment_chunks: int | None = None,
    longest: int | None = None,
) -> None:
    """Carry the state through each sequence's chunks; ``v`` and ``out`` ``[T, H, V]``.

    ``segment_chunks``: chunks in a segment, 0 for a serial scan; None: by
    :func:`prfaas_kernels.common.segments.plan_segments`, which ``longest`` (tokens of the longest sequence) helps.
    """
    table, work, settings = run.table, run.work, run.settings
    sequences = table.cu_seqlens.shape[0] - 1
    if sequences * run.heads == 0:
        return
    if segment_chunks is None:
        segment_chunks = _segment_chunks(run, v, operator, longest)
    segments = find_starts(run, v, state, segment_chunks) if segment_chunks else None
    block = min(settings.scan_block, run.value_width)
    runs = sequences if segments is None else segments.table.bound
    state_scan_kernel[(run.value_width // block, runs * run.heads)](
        work.qg,
        work.kg,
        work.w,
        v if work.u is None else work.u,
        work.scores,
        work.decay,
        out,
        state.pool,
        state.slots,
        state.warm,
        table.cu_seqlens,
        table.first,
        state.chunk_states,
        state.track_state,
        state.track_index,
        state.track_slots,
        None if segments is None else segments.table.chunks,
        None if segments is None else segments.starts,
        segment_chunks,
        *v.stride()[:2],
        *out.stride()[:2],
        *state.strides(state.pool),
        *state.strides(state.track_state),
        run.heads,
        K=run.width,
        V=run.value_width,
        C=CHUNK,
        BV=block,
        HAS_W=work.w is not None,
        HAS_WARM=state.warm is not None,
        STORE_STATE=state.store,
        KEEP_STARTS=state.chunk_states is not None,
        TRACK=state.track_state is not None,
        TRACK_SLOTS=state.track_slots is not None,
        SEGMENTED=segments is not None,
        DOT=run.precision.dot,
        PREC=run.precision.prec,
        STAGES=settings.scan_stages,
        num_warps=settings.scan_warps,
        num_stages=settings.scan_stages,
    )


def scan_delta(
    run: ChunkRun, inputs: DeltaInputs, *, operator: str, store: bool = True, segment_chunks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scan of KDA and GDN once W and U are there. Returns ``o`` ``[1, T, HV, V]`` and, where ``inputs`` asks for
    them, the states at the starts of chunks ``[1, chunks, HV, V, K]``: their number is read from the device.
    """
    v = inputs.v[0]
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    starts = None
    if inputs.return_chunk_states:
        chunks = real_chunks(inputs.cu_seqlens)
        starts = torch.empty(chunks, run.heads, run.value_width, run.width, device=v.device)
    state = StateIo(
        pool=inputs.state_pool,
        slots=inputs.cache_indices,
        store=store,
        chunk_states=starts,
        track_state=None if inputs.track_chunk_idx is None else inputs.track_state,
        track_index=inputs.track_chunk_idx,
    )
    run_scan(run, v, out, state, operator=operator, segment_chunks=segment_chunks, longest=inputs.max_seqlen)
    return out.unsqueeze(0), None if starts is None or not starts.shape[0] else starts.unsqueeze(0)
