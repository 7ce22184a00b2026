"""Launches before the scan that operators share: prep with one gate for a head, and the delta rule's solve."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_run import ChunkRun
from prfaas_kernels.common.chunk_table import CHUNK
from prfaas_kernels.common.delta_solve import delta_solve_kernel
from prfaas_kernels.common.scalar_prep import scalar_prep_kernel


def run_scalar_prep(
    run: ChunkRun,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    *,
    scale: float,
    l2norm: bool,
) -> None:
    """``q``, ``k`` ``[T, Hk, K]``, ``beta`` ``[T, HV]`` or None (no delta rule), ``g`` ``[T, HV]`` log decay or
    ``[HV]`` slopes: fills all of the workspace but ``u``.
    """
    table = run.table
    if table.bound == 0:
        return
    fixed = g.dim() == 1
    scalar_prep_kernel[(table.bound, run.heads)](
        q,
        k,
        g,
        beta,
        table.chunks,
        table.cu_seqlens,
        *run.work.prepared,
        *q.stride()[:2],
        *k.stride()[:2],
        *((0, 0) if fixed else g.stride()),
        *((0, 0) if beta is None else beta.stride()),
        run.heads,
        scale,
        DELTA=beta is not None,
        FIXED=fixed,
        L2NORM=l2norm,
        **run.prep_options(q),
    )


def run_solve(run: ChunkRun, v: torch.Tensor, beta: torch.Tensor, *, raw_beta: bool) -> None:
    """``v`` ``[T, HV, V]``, ``beta`` ``[T, HV]``: fills the workspace's ``w`` (from ``k 2^G``) and ``u``."""
    table, work = run.table, run.work
    if table.bound == 0:
        return
    delta_solve_kernel[(table.bound, run.heads)](
        work.lower,
        work.w,
        work.u,
        v,
        beta,
        table.chunks,
        table.cu_seqlens,
        *v.stride()[:2],
        *beta.stride(),
        run.heads,
        K=run.width,
        V=run.value_width,
        C=CHUNK,
        BLOCK=min(run.settings.solve_block, run.width, run.value_width),
        RAW_BETA=raw_beta,
        DOT=run.precision.dot,
        PREC=run.precision.prec,
        MERGE_PREC=run.precision.merge_prec,
        num_warps=run.settings.solve_warps,
    )
