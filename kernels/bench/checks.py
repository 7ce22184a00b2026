"""Checks of the kernels against the float64 recurrences; need torch and triton only, on a GPU or in the interpreter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


#: Rows of one check.
Check = Callable[[], list[dict[str, Any]]]


class Batch(NamedTuple):
    """Sequences over T tokens, two value heads; states ``[N + 1, 2, width, width]`` to copy a pool from."""

    device: str
    width: int
    tokens: int
    cu: torch.Tensor
    slots: torch.Tensor
    fresh: torch.Tensor

    @property
    def initial(self) -> torch.Tensor:
        """Of each sequence."""
        return self.fresh[self.slots.long()]


HEADS = 2


def _batch(device: str, width: int, lengths: tuple[int, ...]) -> Batch:
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    slots = torch.arange(len(lengths), 0, -1, dtype=torch.int32, device=device)
    fresh = torch.randn(len(lengths) + 1, HEADS, width, width, device=device) * 0.3
    return Batch(device, width, sum(lengths), cu, slots, fresh)


def _kda_rows(batch: Batch, dtype: torch.dtype, gate: str) -> list[dict[str, Any]]:
    """Serial and in segments."""
    from prfaas_kernels.kda.chunk_triton import KdaInputs, chunk_kda

    lower_bound = GATES[gate][2]
    x = kda_inputs(batch.tokens, 1, HEADS, batch.width, dtype, batch.device, gate)
    want, states = kda_truth(x, batch.cu, batch.initial, lower_bound)
    rows = []
    for name, segment_chunks in (("kda", None), ("kda in segments,", 1)):
        pool = batch.fresh.clone()
        inputs = KdaInputs(
            **x,
            beta_is_raw=True,
            lower_bound=lower_bound,
            state_pool=pool,
            cache_indices=batch.slots,
            cu_seqlens=batch.cu,
        )
        out, _ = chunk_kda(inputs, segment_chunks=segment_chunks)
        errors = relative_error(out[0], want), relative_error(pool[batch.slots.long()], states)
        rows.append(_row(f"{name} {gate} {dtype}", dtype, *errors))
    return rows


def _gdn_rows(batch: Batch, dtype: torch.dtype) -> list[dict[str, Any]]:
    from prfaas_kernels.gdn.chunk_triton import GdnInputs, chunk_gdn

    x = kda_inputs(batch.tokens, 1, HEADS, batch.width, dtype, batch.device)
    given = {
        **{name: x[name] for name in "qkv"},
        "log_decay": -torch.rand(1, batch.tokens, HEADS, device=batch.device),
        "beta": x["beta"].sigmoid(),
    }
    want, states = recurrent_gdn(*(y[0] for y in given.values()), initial_state=batch.initial, cu_seqlens=batch.cu)
    pool = batch.fresh.clone()
    out, _ = chunk_gdn(GdnInputs(**given, state_pool=pool, cache_indices=batch.slots, cu_seqlens=batch.cu))
    errors = relative_error(out[0], want), relative_error(pool[batch.slots.long()], states)
    return [_row(f"gdn {dtype}", dtype, *errors)]


def _lightning_rows(batch: Batch, dtype: torch.dtype) -> list[dict[str, Any]]:
    from prfaas_kernels.lightning.chunk_triton import LightningInputs, chunk_lightning

    q, k, v = (torch.randn(batch.tokens, HEADS, batch.width, device=batch.device).to(dtype) for _ in range(3))
    slopes, pool = torch.tensor([0.01, 1.0], device=batch.device), batch.fresh.clone()
    want, states = recurrent_lightning(q, k, v, slopes, initial_state=batch.initial, cu_seqlens=batch.cu)
    inputs = LightningInputs(
        q=q, k=k, v=v, slopes=slopes, state_pool=pool, cache_indices=batch.slots, cu_seqlens=batch.cu
    )
    errors = relative_error(chunk_lightning(inputs), want), relative_error(pool[batch.slots.long()], states)
    return [_row(f"lightning {dtype}", dtype, *errors)]


def _guarded(name: str, dtype: torch.dtype, check: Check) -> list[dict[str, Any]]:
    """The rows of ``check``, or a red one that says what it raised."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001  (a kernel that does not compile, say: red, and no end of the others)
        return [{**_row(f"{name} {dtype}", dtype, math.nan, math.nan), "error": repr(error)[:500]}]


def run_checks(
    operator: str, device: str, *, width: int = 128, lengths: tuple[int, ...] = (130, 1, 64, 17)
) -> list[dict[str, Any]]:
    """``operator``: kda, gdn, lightning, attention or kv_pack. One row per check: its name, both relative errors, the
    limit and whether it is green; where a check raised, it is red and ``error`` says what.
    """
    if operator == "kv_pack":
        return _guarded(operator, torch.float32, lambda: _pack_checks(device))
    batch = _batch(device, width, lengths)
    rows: list[dict[str, Any]] = []
    for dtype in LIMITS:
        for name, check in _checks_of(operator, batch, dtype):
            rows += _guarded(name, dtype, check)
    return rows


def _checks_of(operator: str, batch: Batch, dtype: torch.dtype) -> list[tuple[str, Check]]:
    if operator == "kda":
        return [(f"kda {gate}", functools.partial(_kda_rows, batch, dtype, gate)) for gate in GATES]
    checks = {"gdn": _gdn_rows, "lightning": _lightning_rows, "attention": _attention_rows}
    return [(operator, functools.partial(checks[operator], batch, dtype))]


def _attention_rows(batch: Batch, dtype: torch.dtype) -> list[dict[str, Any]]:
    """40 and 3 new tokens after 0 and 50 in shuffled pages; relative error in o, none in a state."""
    device, width = batch.device, batch.width
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
    return [_row(f"attention {dtype}", dtype, relative_error(got, want), 0.0)]


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
