"""Checks of the kernels against the float64 recurrences; need torch and triton only, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from prfaas_kernels.full_attention import naive_prefill, prefill_attention
from prfaas_kernels.gdn import recurrent_gdn
from prfaas_kernels.kda import kda_gate, recurrent_kda
from prfaas_kernels.kv_pack import PoolTable, encode_rows, pack_rows, quantise_rows, unpack_rows
from prfaas_kernels.lightning import recurrent_lightning

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
#: name -> (shift of the raw gate, share of tokens with a spike, lower bound)
GATES = {
    "mild": (-3.0, 0.0, None),
    "usual": (0.0, 0.0, None),
    "strong": (5.0, 0.0, None),
    "spiked": (0.0, 0.05, None),
    "bounded": (0.0, 0.0, -5.0),
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance; NaN stays NaN and fails every comparison."""
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def kda_inputs(
    tokens: int, heads: int, value_heads: int, width: int, dtype: torch.dtype, device: str, gate: str = "usual"
) -> dict[str, torch.Tensor]:
    """Raw gate and beta; q, k, v are strided views of one tensor, as SGLang passes them."""
    rng = torch.Generator().manual_seed(0)
    shift, spikes, _ = GATES[gate]
    sizes = [heads * width, heads * width, value_heads * width]
    q, k, v = torch.randn(1, tokens, sum(sizes), generator=rng).to(dtype).to(device).split(sizes, dim=-1)
    g = torch.randn(1, tokens, value_heads, width, generator=rng) + shift
    g = torch.where(torch.rand(g.shape, generator=rng) < spikes, g + 200.0, g)
    return {
        "q": q.unflatten(-1, (heads, width)),
        "k": k.unflatten(-1, (heads, width)),
        "v": v.unflatten(-1, (value_heads, width)),
        "g": g.to(dtype).to(device),
        "beta": torch.randn(1, tokens, value_heads, generator=rng).to(dtype).to(device),
        "a_log": (torch.randn(value_heads, generator=rng) * 0.5).to(device),
        "dt_bias": torch.randn(value_heads * width, generator=rng).to(device),
    }


def kda_truth(
    x: dict[str, torch.Tensor], cu: torch.Tensor, initial: torch.Tensor, lower_bound: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 recurrence on the inputs of :func:`kda_inputs`."""
    log_decay = kda_gate(x["g"][0].double(), x["a_log"], x["dt_bias"], lower_bound)
    beta = x["beta"][0].double().sigmoid()
    return recurrent_kda(x["q"][0], x["k"][0], x["v"][0], log_decay, beta, initial_state=initial, cu_seqlens=cu)


def gdn_truth(x: dict[str, torch.Tensor], cu: torch.Tensor, initial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 recurrence of GDN, its gate the first channel of KDA's."""
    log_decay = -torch.nn.functional.softplus(x["g"][0, ..., 0].double())
    beta = x["beta"][0].double().sigmoid()
    return recurrent_gdn(x["q"][0], x["k"][0], x["v"][0], log_decay, beta, initial_state=initial, cu_seqlens=cu)


def _row(name: str, dtype: torch.dtype, o_error: float, state_error: float) -> dict[str, Any]:
    limit = LIMITS[dtype]
    green = o_error <= limit and state_error <= limit
    return {"check": name, "o_error": o_error, "state_error": state_error, "limit": limit, "green": green}


def run_checks(device: str, *, width: int = 128, lengths: tuple[int, ...] = (130, 1, 64, 17)) -> list[dict[str, Any]]:
    """One row per check: its name, both relative errors, the limit and whether it is green."""
    from prfaas_kernels.gdn.chunk_triton import chunk_gdn
    from prfaas_kernels.kda.chunk_triton import chunk_kda
    from prfaas_kernels.lightning.chunk_triton import chunk_lightning

    rows: list[dict[str, Any]] = []
    tokens, value_heads = sum(lengths), 2
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    slots = torch.arange(len(lengths), 0, -1, dtype=torch.int32, device=device)
    fresh = torch.randn(len(lengths) + 1, value_heads, width, width, device=device) * 0.3
    for dtype in LIMITS:
        for gate, (_, _, lower_bound) in GATES.items():
            x = kda_inputs(tokens, 1, value_heads, width, dtype, device, gate)
            pool = fresh.clone()
            want, states = kda_truth(x, cu, fresh[slots.long()], lower_bound)
            out, _ = chunk_kda(
                **x, beta_is_raw=True, lower_bound=lower_bound, state_pool=pool, cache_indices=slots, cu_seqlens=cu
            )
            errors = relative_error(out[0], want), relative_error(pool[slots.long()], states)
            rows.append(_row(f"kda {gate} {dtype}", dtype, *errors))
            pool = fresh.clone()
            out, _ = chunk_kda(
                **x,
                beta_is_raw=True,
                lower_bound=lower_bound,
                state_pool=pool,
                cache_indices=slots,
                cu_seqlens=cu,
                segment_chunks=1,
            )
            errors = relative_error(out[0], want), relative_error(pool[slots.long()], states)
            rows.append(_row(f"kda in segments, {gate} {dtype}", dtype, *errors))
        x = kda_inputs(tokens, 1, value_heads, width, dtype, device)
        g, beta = -torch.rand(1, tokens, value_heads, device=device), x["beta"].sigmoid()
        pool = fresh.clone()
        want, states = recurrent_gdn(
            x["q"][0], x["k"][0], x["v"][0], g[0], beta[0], initial_state=fresh[slots.long()], cu_seqlens=cu
        )
        out, _ = chunk_gdn(x["q"], x["k"], x["v"], g, beta, state_pool=pool, cache_indices=slots, cu_seqlens=cu)
        errors = relative_error(out[0], want), relative_error(pool[slots.long()], states)
        rows.append(_row(f"gdn {dtype}", dtype, *errors))
        qkv = [torch.randn(tokens, value_heads, width, device=device).to(dtype) for _ in range(3)]
        slopes, pool = torch.tensor([0.01, 1.0], device=device), fresh.clone()
        want, states = recurrent_lightning(*qkv, slopes, initial_state=fresh[slots.long()], cu_seqlens=cu)
        out = chunk_lightning(*qkv, slopes, state_pool=pool, cache_indices=slots, cu_seqlens=cu)
        errors = relative_error(out, want), relative_error(pool[slots.long()], states)
        rows.append(_row(f"lightning {dtype}", dtype, *errors))

    rows += [_attention_row(dtype, device, width) for dtype in LIMITS]
    rows += _pack_checks(device)
    return rows


def _attention_row(dtype: torch.dtype, device: str, width: int) -> dict[str, Any]:
    """40 and 3 new tokens after 0 and 50 in shuffled pages; relative error in o, none in a state."""
    q = torch.randn(43, 4, width, device=device).to(dtype)
    k, v = (torch.randn(43, 2, width, device=device).to(dtype) for _ in range(2))
    k_pool, v_pool = (torch.randn(8 * 16, 2, width, device=device).to(dtype) for _ in range(2))
    options = {
        "cu_seqlens": torch.tensor([0, 40, 43], dtype=torch.int32, device=device),
        "page_table": torch.tensor([[1, 4, 2, 7], [6, 3, 5, 0]], dtype=torch.int32, device=device),
        "prefix_lens": torch.tensor([0, 50], dtype=torch.int32, device=device),
        "page_size": 16,
    }
    want = naive_prefill(q, k, v, k_pool=k_pool, v_pool=v_pool, **options)
    got = prefill_attention(q, k, v, k_pool=k_pool, v_pool=v_pool, **options)
    return _row(f"attention {dtype}", dtype, relative_error(got, want), 0.0)


def _pack_checks(device: str) -> list[dict[str, Any]]:
    """Bytes that come back changed, or differ from the codec's, make a row red."""
    pools = [torch.randn(64, 576, device=device).bfloat16() for _ in range(3)]
    targets = [torch.zeros_like(pool) for pool in pools]
    pages = torch.tensor([3, 0], dtype=torch.int32, device=device)
    table = PoolTable.of(pools, page_size=16)
    unpack_rows(PoolTable.of(targets, page_size=16), pages, pack_rows(table, pages))
    same = all(torch.equal(a[48:], b[48:]) and torch.equal(a[:16], b[:16]) for a, b in zip(targets, pools, strict=True))
    verdicts = {"kv_pack and back": same}
    for code in (torch.int8, torch.float8_e4m3fn):
        data = quantise_rows(table, pages, width=576, code=code)
        want = [encode_rows(pool.view(4, -1)[[3, 0]].cpu(), width=576, code=code) for pool in pools]
        verdicts[f"quantised rows equal the codec's, {code}"] = torch.equal(data.cpu(), torch.stack(want))
    return [_row(name, torch.float32, *[0.0 if good else float("nan")] * 2) for name, good in verdicts.items()]
