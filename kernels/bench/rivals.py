"""The rivals of each operator, where they can be imported: fla-core's and SGLang's in-tree kernels; the same semantics.

Each is a function and its arguments, so that a test can hold them against the installed version's signature.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from arms import Case, gdn_gates, lightning_qkv, lightning_slopes, slots_of
from timing import Arm

#: Switch off what fla-core may pick instead of its Triton kernels.
FLA_ENVIRONMENT = {"FLA_FLASH_KDA": "0", "FLA_FLASH_QLA": "0"}


class Call(NamedTuple):
    """``function(**arguments)`` is timed; ``restore`` puts back what it changed."""

    package: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    restore: Callable[[], object] = lambda: None
    label: str = ""

    def as_arm(self) -> Arm:
        """Its results as a tuple, o ``[1, T, H, V]`` first."""

        def run() -> Any:
            out = self.function(**self.arguments)
            out = out if isinstance(out, tuple) else (out,)
            return out if out[0].dim() == 4 else (out[0].unsqueeze(0), *out[1:])

        return Arm(f"{self.package} {importlib.metadata.version(self.package)}{self.label}", run, self.restore)


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _fla(module: str, name: str, case: Case, **arguments: Any) -> Call:
    """States are inputs and results of fla-core's functions, ``[N, H, K, V]``; nothing is changed in place."""
    arguments = {
        **{part: case.x[part] for part in "qkv"},
        "initial_state": case.initial.mT.contiguous(),
        "output_final_state": True,
        "cu_seqlens": case.cu.long(),
        **arguments,
    }
    return Call("fla-core", _load(module, name), arguments, functools.partial(_intracard, "0"))


def _intracard(switch: str) -> None:
    """Whether fla-core cuts long sequences into segments; it looks at every call, and only in inference mode."""
    os.environ["FLA_INTRACARD_CP"] = switch


def _in_segments(call: Call) -> Call:
    return call._replace(restore=functools.partial(_intracard, "1"), label=" in segments")


def fla_kda(case: Case) -> Call:
    """Raw gate and beta, or an activated beta where the installed fla-core takes no raw one."""
    x = case.x
    raw = "use_beta_sigmoid_in_kernel" in inspect.signature(_load("fla.ops.kda", "chunk_kda")).parameters
    return _fla(
        "fla.ops.kda",
        "chunk_kda",
        case,
        g=x["g"],
        beta=x["beta"] if raw else x["beta"].sigmoid(),
        A_log=x["a_log"],
        dt_bias=x["dt_bias"],
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        **({"use_beta_sigmoid_in_kernel": True} if raw else {}),
    )


def fla_kda_in_segments(case: Case) -> Call:
    """The same with its context parallelism inside one GPU."""
    return _in_segments(fla_kda(case))


def fla_gdn(case: Case) -> Call:
    """Log decay and activated beta."""
    g, beta = gdn_gates(case)
    return _fla(
        "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", case, g=g, beta=beta, use_qk_l2norm_in_kernel=True
    )


def fla_gdn_in_segments(case: Case) -> Call:
    """The same with its context parallelism inside one GPU."""
    return _in_segments(fla_gdn(case))


def fla_lightning(case: Case) -> Call:
    """Its Lightning attention is ``chunk_simple_gla`` with a fixed decay for each head."""
    return _fla(
        "fla.ops.simple_gla",
        "chunk_simple_gla",
        case,
        g_gamma=-lightning_slopes(case),
        initial_state=case.initial.clone(),
    )


def sglang_kda(case: Case) -> Call:
    """It overwrites its inputs, so they are restored outside the timed part."""
    function = _load("sglang.kernels.ops.attention.fla.kda", "chunk_kda")
    x = {name: value.clone() for name, value in case.x.items() if name not in ("q", "k", "v")}
    packed = torch.cat([case.x[name].flatten(2) for name in ("q", "k", "v")], dim=-1)
    q, k, v = (part.unflatten(-1, case.x["q"].shape[2:]) for part in packed.chunk(3, dim=-1))
    fresh, pool = packed.clone(), case.initial.clone()

    def restore() -> None:
        packed.copy_(fresh)
        pool.copy_(case.initial)
        for name, value in x.items():
            value.copy_(case.x[name])

    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "g": x["g"],
        "beta": x["beta"],
        "A_log": x["a_log"],
        "dt_bias": x["dt_bias"],
        "beta_is_raw": True,
        "initial_state": pool,
        "initial_state_indices": slots_of(case),
        "use_qk_l2norm_in_kernel": True,
        "cu_seqlens": case.cu,
    }
    return Call("sglang", function, arguments, restore)


def sglang_gdn(case: Case) -> Call:
    """State updated in place."""
    function = _load("sglang.kernels.ops.attention.fla.chunk", "chunk_gated_delta_rule")
    pool, (g, beta) = case.initial.clone(), gdn_gates(case)
    arguments = {
        **{part: case.x[part] for part in "qkv"},
        "g": g,
        "beta": beta,
        "initial_state": pool,
        "initial_state_indices": slots_of(case),
        "cu_seqlens": case.cu,
        "use_qk_l2norm_in_kernel": True,
    }
    return Call("sglang", function, arguments, lambda: pool.copy_(case.initial))


def sglang_lightning(case: Case) -> Call:
    """State updated in place; all sequences resume."""
    module = "sglang.kernels.ops.attention.linear.seg_la"
    function, meta_of = _load(module, "seg_la_fwd"), _load(module, "SegLaMeta")
    pool, (q, k, v) = case.initial.clone(), lightning_qkv(case)
    lengths = case.cu.diff()
    meta = meta_of(
        batch_size=lengths.shape[0],
        max_q_length=None,
        q_offsets=case.cu,
        s_offsets=slots_of(case),
        q_lengths=lengths,
        s_scales=torch.ones_like(lengths, dtype=torch.bool),
    )
    arguments = {"q": q, "k": k, "v": v, "s": pool, "decay_scales": lightning_slopes(case), "meta": meta}
    return Call("sglang", function, arguments, lambda: pool.copy_(case.initial))


def sglang_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int) -> Call:
    """FlashAttention 3 as SGLang has it; ``q``, ``k``, ``v`` ``[T, ., D]``."""
    arguments = {
        **{"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu},
        **{"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True},
    }
    return Call("sglang-kernel", _load("sgl_kernel.flash_attn", "flash_attn_varlen_func"), arguments)


#: Operator -> rivals of ours.
RIVALS: dict[str, tuple[Callable[[Case], Call], ...]] = {
    "kda": (fla_kda, fla_kda_in_segments, sglang_kda),
    "gdn": (fla_gdn, fla_gdn_in_segments, sglang_gdn),
    "lightning": (fla_lightning, sglang_lightning),
}


def brief(error: Exception) -> str:
    """The first line of what an error says, for the report."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0][:200]


def rivals(operator: str, case: Case) -> tuple[list[Arm], list[str]]:
    """Those that run on ``case``, and why the others don't."""
    return that_run(RIVALS[operator], case)


def that_run(makers: Sequence[Callable[..., Call]], *inputs: Any) -> tuple[list[Arm], list[str]]:
    """The arms of those makers whose call works, and why the others' doesn't."""
    arms: list[Arm] = []
    absent: list[str] = []
    for maker in makers:
        try:
            arm = maker(*inputs).as_arm()
            arm.restore()
            arm.run()
        except ImportError as error:
            absent.append(f"{maker.__name__} can't be imported ({brief(error)})")
        except Exception as error:  # noqa: BLE001  (whatever it raises is the reason that the report prints)
            absent.append(f"{maker.__name__} failed: {brief(error)}")
        else:
            arms.append(arm)
    return arms, absent


class Dispatched(logging.Handler):
    """Collects what fla-core says about the implementations that it picked instead of its own kernels."""

    MARK = "[FLA Backend]"

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith(self.MARK) and text not in self.lines:
            self.lines.append(text)

    def attach(self) -> None:
        """Listen to fla-core's logger."""
        logger = logging.getLogger("fla.backends")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
