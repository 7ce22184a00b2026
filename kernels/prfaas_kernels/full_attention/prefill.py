"""Launch of the prefill attention, what it supports, and whether it is to be preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from prfaas_kernels.common.dispatch import Choice

if TYPE_CHECKING:
    from prfaas_kernels.common.tuning import Settings

LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: (name of the GPU, Triton's major.minor) -> (K, V) that kernels/bench measured faster there than what SGLang picks.
#: Empty until measured: nothing is taken over by default.
MEASURED_FASTER: dict[tuple[str, str], frozenset[tuple[int, int]]] = {}


def split_width(width: int) -> tuple[int, int]:
    """K into (MAIN, EXTRA): the largest power of two in it and the rest, 0 or a power of two of at least 16.

    192 is 128 + 64, 576 is 512 + 64. Raises ValueError for other widths.
    """
    main = 1 << (width.bit_length() - 1) if width > 0 else 0
    extra = width - main
    if main < 16 or extra & (extra - 1) or 0 < extra < 16:
        raise ValueError(f"K must be a power of two of at least 16, or two of them in sum, got {width}")
    return main, extra


def preference(gpu: str, triton_version: str, *, width: int, value_width: int) -> Choice:
    """Whether to take these kernels over SGLang's own for heads of K = ``width``, V = ``value_width``; with the reason.

    ``backend`` is "triton" (these kernels) or "sglang".
    """
    if (width, value_width) in MEASURED_FASTER.get((gpu, triton_version), frozenset()):
        return Choice("triton", f"measured faster on {gpu} with K={width}, V={value_width}")
    return Choice("sglang", f"not measured faster on {gpu} with Triton {triton_version}, K={width}, V={value_width}")


class Blocks(NamedTuple):
    """How a launch is cut: ``tokens`` with ``heads`` of a group are at most ``rows`` query rows; ``keys`` at a time."""

    rows: int
    keys: int
    heads: int
    tokens: int
    stages: int


def plan_blocks(settings: Settings, dtype: torch.dtype, *, group: int, value_width: int) -> Blocks:
    """``group``: query heads of a key head. Blocks are smaller where V is over 128, and for float32."""
    rows, keys, stages = settings.attention_rows, settings.attention_keys, settings.attention_stages
    if value_width > 128:
        rows, keys = settings.attention_wide_rows, settings.attention_wide_keys
    if dtype == torch.float32:  # twice the bytes: shared memory would run out
        rows, keys, stages = rows // 2, keys // 2, 1
    heads = next(n for n in range(min(group, rows), 0, -1) if group % n == 0)
    return Blocks(rows, keys, heads, rows // heads, stages)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, value_width: int, main: int) -> None:
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise ValueError(f"q and k must be bfloat16, float16 or float32 alike, got {q.dtype} and {k.dtype}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if v is None and value_width != main:
        raise ValueError(f"values inside keys must be their first {main} channels, got value_width={value_width}")
    if value_width < 16 or value_width & (value_width - 1):
        raise ValueError(f"V must be a power of two of at least 16, got {value_width}")
    if any(x is not None and x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("the innermost dimension of q, k or v is strided: make it contiguous")


def _check_prefix(
    v: torch.Tensor | None,
    k_pool: torch.Tensor | None,
    v_pool: torch.Tensor | None,
    page_table: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
    page_size: int,
) -> None:
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two, got {page_size}")
    if (k_pool is None) != (page_table is None) or (k_pool is None) != (prefix_lens is None):
        raise ValueError("a prefix needs k_pool, page_table and prefix_lens together")
    if k_pool is not None and (v is None) != (v_pool is None):
        raise ValueError("v and v_pool must both be given, or both be None (values inside the keys)")


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    k_pool: torch.Tensor | None = None,
    v_pool: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None,
    page_size: int = 1,
    value_width: int | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """New tokens attend to their sequence's cached prefix and, causally, to one another; one launch, no host sync.

    ``q`` ``[T, H, K]``, ``k`` ``[T, Hkv, K]``, ``v`` ``[T, Hkv, V]``, strided; ``cu_seqlens`` ``[N+1]``. Prefix (all
    four or none): ``k_pool`` ``[slots, Hkv, K]``, ``v_pool`` ``[slots, Hkv, V]``, ``page_table`` ``[N, P]`` of page
    numbers, ``prefix_lens`` ``[N]``; a page has ``page_size`` (a power of two) consecutive slots.
    MLA without absorption: K = 192, V = 128. MLA absorbed: ``v`` and ``v_pool`` None, ``k`` and ``k_pool`` latents
    with Hkv = 1, K = 576, ``value_width`` 512. ``scale`` None means ``K ** -0.5`` (absorbed MLA must give its own).
    Returns ``[T, H, V]`` in the dtype of ``q``; rows of no sequence are zeros, or as ``out`` has them.
    Raises ValueError for shapes and dtypes that are not supported.
    """
    from prfaas_kernels.common.chunk_table import build_chunk_table
    from prfaas_kernels.common.precision import precision_of
    from prfaas_kernels.common.tuning import settings_for
    from prfaas_kernels.full_attention.kernel import prefill_attention_kernel

    tokens, heads, width = q.shape
    main, extra = split_width(width)
    values = v.shape[-1] if v is not None else main if value_width is None else value_width
    _check(q, k, v, values, main)
    _check_prefix(v, k_pool, v_pool, page_table, prefix_lens, page_size)
    settings, precision = settings_for(q.device), precision_of(q.dtype)
    group = heads // k.shape[1]
    blocks = plan_blocks(settings, q.dtype, group=group, value_width=values)
    if out is None:
        out = torch.zeros(tokens, heads, values, dtype=q.dtype, device=q.device)
    table = build_chunk_table(cu_seqlens, tokens, blocks.tokens)
    if table.bound == 0:
        return out
    v_rows = k if v is None else v
    paged_k = k if k_pool is None else k_pool
    paged_v = paged_k if v_pool is None else v_pool
    prefill_attention_kernel[(table.bound, k.shape[1] * (group // blocks.heads))](
        q,
        k,
        v_rows,
        out,
        paged_k,
        paged_v,
        page_table,
        prefix_lens,
        table.chunks,
        cu_seqlens,
        (width**-0.5 if scale is None else scale) * LOG2_E,
        *q.stride()[:2],
        *k.stride()[:2],
        *v_rows.stride()[:2],
        *out.stride()[:2],
        *paged_k.stride()[:2],
        *paged_v.stride()[:2],
        0 if page_table is None else page_table.stride(0),
        GROUP=group,
        HEADS=blocks.heads,
        TOKENS=blocks.tokens,
        ROWS=blocks.rows,
        KEYS=blocks.keys,
        PAGE=page_size,
        MAIN=main,
        EXTRA=extra,
        V=values,
        SHARED=v is None,
        PREFIX=k_pool is not None,
        DOT=precision.dot,
        PREC=precision.prec,
        STAGES=blocks.stages,
        num_warps=settings.attention_warps,
        num_stages=blocks.stages,
    )
    return out
