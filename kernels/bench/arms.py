"""The contenders of each operator: ours and, where they can be imported, fla-core's and SGLang's; the same semantics.

All start from strided views of one tensor, as SGLang's models hand them over: copies that an arm needs are its time.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from checks import kda_inputs
from prfaas_kernels.common.tuning import Settings
from timing import Arm


class Case(NamedTuple):
    """bfloat16 inputs ``x`` (see :func:`checks.kda_inputs`), ``cu`` ``[N+1]``, initial states ``[N, H, V, K]``."""

    x: dict[str, torch.Tensor]
    cu: torch.Tensor
    initial: torch.Tensor


#: How a contender is made: an arm, or why it takes no part.
Maker = Callable[[Case], Arm | str]


def make_case(tokens: int, heads: int, lengths: list[int], device: str, width: int = 128) -> Case:
    """``lengths`` of the sequences, ``tokens`` in sum."""
    x = kda_inputs(tokens, heads, heads, width, torch.bfloat16, device)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device, dtype=torch.int32)
    return Case(x, cu, torch.randn(len(lengths), heads, width, width, device=device) * 0.1)


def brief(error: Exception) -> str:
    """The first line of what an error says, for the report."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0][:200]


def _slots(case: Case) -> torch.Tensor:
    return torch.arange(case.initial.shape[0], dtype=torch.int32, device=case.initial.device)


def _log_decay(case: Case) -> torch.Tensor:
    """GDN's gate from KDA's inputs: one channel of it."""
    return -torch.nn.functional.softplus(case.x["g"][..., 0].float())


def kda_ours(case: Case, settings: Settings | None = None, segment_chunks: int | None = None) -> Arm:
    """Raw gate and beta, state updated in place."""
    from prfaas_kernels.kda.chunk_triton import chunk_kda

    pool, slots = case.initial.clone(), _slots(case)

    def run() -> Any:
        return chunk_kda(
            **case.x,
            beta_is_raw=True,
            state_pool=pool,
            cache_indices=slots,
            cu_seqlens=case.cu,
            settings=settings,
            segment_chunks=segment_chunks,
        )

    return Arm("prfaas serial" if segment_chunks == 0 else "prfaas", run, lambda: pool.copy_(case.initial))


def kda_fla(case: Case) -> Arm | str:
    """fla-core's ``chunk_kda``; its FlashKDA path is switched off by ``FLA_FLASH_KDA=0``."""
    try:
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        return f"fla-core can't be imported ({brief(error)})"
    raw = "use_beta_sigmoid_in_kernel" in inspect.signature(chunk_kda).parameters
    state, marks, x = case.initial.mT.contiguous(), case.cu.long(), case.x

    def run() -> Any:
        return chunk_kda(
            q=x["q"],
            k=x["k"],
            v=x["v"],
            g=x["g"],
            beta=x["beta"] if raw else x["beta"].sigmoid(),
            A_log=x["a_log"],
            dt_bias=x["dt_bias"],
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            cu_seqlens=marks,
            **({"use_beta_sigmoid_in_kernel": True} if raw else {}),
        )

    return Arm("fla-core " + importlib.metadata.version("fla-core"), run)


def kda_sglang(case: Case) -> Arm | str:
    """SGLang's in-tree ``chunk_kda``; it overwrites its inputs, so they are restored outside the timed part."""
    try:
        from sglang.kernels.ops.attention.fla.kda import chunk_kda
    except ImportError as error:
        return f"sglang can't be imported ({brief(error)})"
    x = {name: value.clone() for name, value in case.x.items() if name not in ("q", "k", "v")}
    packed = torch.cat([case.x[name].flatten(2) for name in ("q", "k", "v")], dim=-1)
    q, k, v = (part.unflatten(-1, case.x["q"].shape[2:]) for part in packed.chunk(3, dim=-1))
    fresh, pool, slots = packed.clone(), case.initial.clone(), _slots(case)

    def restore() -> None:
        packed.copy_(fresh)
        pool.copy_(case.initial)
        for name, value in x.items():
            value.copy_(case.x[name])

    def run() -> Any:
        out = chunk_kda(
            q=q,
            k=k,
            v=v,
            g=x["g"],
            beta=x["beta"],
            A_log=x["a_log"],
            dt_bias=x["dt_bias"],
            beta_is_raw=True,
            initial_state=pool,
            initial_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=case.cu,
        )
        return out if isinstance(out, tuple) else (out,)

    return Arm("sglang " + importlib.metadata.version("sglang"), run, restore)


def gdn_ours(case: Case) -> Arm:
    """Log decay and activated beta, state updated in place."""
    from prfaas_kernels.gdn.chunk_triton import chunk_gdn

    pool, slots, x = case.initial.clone(), _slots(case), case.x
    g, beta = _log_decay(case), x["beta"].float().sigmoid()

    def run() -> Any:
        return chunk_gdn(x["q"], x["k"], x["v"], g, beta, state_pool=pool, cache_indices=slots, cu_seqlens=case.cu)

    return Arm("prfaas", run, lambda: pool.copy_(case.initial))


def gdn_fla(case: Case) -> Arm | str:
    """fla-core's ``chunk_gated_delta_rule``."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        return f"fla-core can't be imported ({brief(error)})"
    state, marks, x = case.initial.mT.contiguous(), case.cu.long(), case.x
    g, beta = _log_decay(case), x["beta"].float().sigmoid()

    def run() -> Any:
        return chunk_gated_delta_rule(
            q=x["q"],
            k=x["k"],
            v=x["v"],
            g=g,
            beta=beta,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=marks,
        )

    return Arm("fla-core " + importlib.metadata.version("fla-core"), run)


def gdn_sglang(case: Case) -> Arm | str:
    """SGLang's in-tree ``chunk_gated_delta_rule``, state updated in place."""
    try:
        from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule
    except ImportError as error:
        return f"sglang can't be imported ({brief(error)})"
    pool, slots, x = case.initial.clone(), _slots(case), case.x
    g, beta = _log_decay(case), x["beta"].float().sigmoid()

    def run() -> Any:
        return chunk_gated_delta_rule(
            q=x["q"],
            k=x["k"],
            v=x["v"],
            g=g,
            beta=beta,
            initial_state=pool,
            initial_state_indices=slots,
            cu_seqlens=case.cu,
            use_qk_l2norm_in_kernel=True,
        )

    return Arm("sglang " + importlib.metadata.version("sglang"), run, lambda: pool.copy_(case.initial))


#: Operator -> rivals of ours.
RIVALS: dict[str, list[Maker]] = {"kda": [kda_fla, kda_sglang], "gdn": [gdn_fla, gdn_sglang]}


def rivals(operator: str, case: Case) -> tuple[list[Arm], list[str]]:
    """Those that run on ``case``, and why the others don't."""
    arms: list[Arm] = []
    absent: list[str] = []
    for maker in RIVALS[operator]:
        try:
            arm = maker(case)
            if isinstance(arm, str):
                absent.append(arm)
                continue
            arm.restore()
            arm.run()
        except Exception as error:  # noqa: BLE001  (whatever it raises is the reason that the report prints)
            absent.append(f"{maker.__name__} failed: {brief(error)}")
        else:
            arms.append(arm)
    return arms, absent
