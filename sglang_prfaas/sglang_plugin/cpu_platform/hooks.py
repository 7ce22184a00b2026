"""Every replacement this platform makes in SGLang 0.5.23, in one table."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from sglang_prfaas.sglang_plugin.cpu_platform import (
    attention,
    elementwise,
    hicache,
    linear_attention,
    lora,
    rope,
    weights,
)

OPS = "sglang.kernels.ops"
ROTARY = "sglang.srt.layers.rotary_embedding"
TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend"


class HookError(RuntimeError):
    """A replacement could not be made, or is no longer in place: the server must not start."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hook:
    """``module:attribute`` in SGLang, what stands there instead, and why."""

    target: str
    replacement: Callable[..., Any]
    reason: str


HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.model_loader.weight_utils:initialize_dummy_weights",
        weights.initialize_dummy_weights,
        "stock dummy weights lie in +-1e-3: logits are flat, and a corrupt cache goes unnoticed",
    ),
    Hook(
        f"{OPS}.mamba.causal_conv1d_triton:causal_conv1d_fn",
        linear_attention.causal_conv1d_fn,
        "Triton kernel: convolution of a prefill",
    ),
    Hook(
        f"{OPS}.mamba.causal_conv1d_triton:causal_conv1d_update",
        linear_attention.causal_conv1d_update,
        "Triton kernel: convolution of a decode step",
    ),
    Hook(f"{OPS}.attention.fla.kda:chunk_kda", linear_attention.chunk_kda, "Triton kernels: KDA prefill"),
    Hook(
        f"{OPS}.attention.fla.fused_recurrent:fused_recurrent_kda_packed_decode",
        linear_attention.fused_recurrent_kda_packed_decode,
        "Triton kernel: KDA decode",
    ),
    Hook(
        f"{OPS}.attention.linear.fused_sigmoid_gating_recurrent:fused_sigmoid_gating_delta_rule_update",
        linear_attention.fused_sigmoid_gating_delta_rule_update,
        "Triton kernel: KDA decode with a lower bound of the gate",
    ),
    Hook(
        f"{OPS}.attention.fla.chunk:chunk_gated_delta_rule",
        linear_attention.chunk_gated_delta_rule,
        "Triton kernels: GDN prefill",
    ),
    Hook(
        f"{OPS}.attention.fla.fused_recurrent:fused_recurrent_gated_delta_rule_packed_decode",
        linear_attention.fused_recurrent_gated_delta_rule_packed_decode,
        "Triton kernel: GDN decode",
    ),
    Hook(
        f"{OPS}.attention.linear.fused_gdn_gating:fused_gdn_gating",
        linear_attention.fused_gdn_gating,
        "Triton kernel: GDN gates of a prefill",
    ),
    Hook(
        f"{OPS}.attention.triton_gdn_fused_proj:fused_qkvzba_split_reshape_cat",
        elementwise.fused_qkvzba_split_reshape_cat,
        "Triton kernel: splits Qwen3-Next's fused projections",
    ),
    Hook(
        f"{OPS}.attention.linear.seg_la:seg_la_fwd",
        linear_attention.seg_la_fwd,
        "Triton kernels: Lightning attention, prefill and decode",
    ),
    Hook(
        f"{OPS}.attention.fla.fused_norm_gate:rms_norm_gated",
        elementwise.rms_norm_gated,
        "Triton kernel: gated RMSNorm behind linear attention",
    ),
    Hook(
        f"{OPS}.attention.fla.layernorm_gated:layernorm_fn",
        elementwise.layernorm_fn,
        "Triton kernel: norms around Lightning attention",
    ),
    Hook(
        f"{OPS}.elementwise.elementwise:fused_gate_sigmoid_mul",
        elementwise.fused_gate_sigmoid_mul,
        "Triton kernel: gate of a shared expert",
    ),
    Hook(
        f"{OPS}.elementwise.elementwise:fused_gate_sigmoid_mul_add",
        elementwise.fused_gate_sigmoid_mul_add,
        "Triton kernel: gate of a shared expert, added to the routed ones",
    ),
    Hook(
        f"{ROTARY}.factory:get_rope_cpu",
        rope.get_rope_cpu,
        "builds one kind of scaling only, which Ring's linear layers do not have",
    ),
    Hook(
        f"{ROTARY}.base:RotaryEmbedding.forward_cuda",
        rope.forward_cuda,
        "Ring's MLA calls this CUDA kernel by name",
    ),
    Hook(
        f"{TORCH_NATIVE}:TorchNativeAttnBackend.forward_extend",
        attention.forward_extend,
        "reads a sliding-window pool with indices of the full pool, computes a cached prefix again, knows no sinks",
    ),
    Hook(
        f"{TORCH_NATIVE}:TorchNativeAttnBackend.forward_decode",
        attention.forward_decode,
        "reads a sliding-window pool with indices of the full pool, knows no sinks",
    ),
    Hook(
        f"{hicache.POOL_HOST}.common:_cuda_host_register",
        hicache.cuda_host_register,
        "pins HiCache's host pool for CUDA",
    ),
    Hook(
        "sglang.srt.lora.lora:LoRAAdapter.initialize_weights",
        lora.initialize_weights,
        "reads no adapter's files where the model's weights are dummies",
    ),
)


def resolve(target: str) -> tuple[Any, str, Any]:
    """``(owner, attribute, value)`` of ``module:a.b``. Raises HookError naming the part that is missing."""
    module_name, _, path = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise HookError(f"CPU platform: cannot import {module_name} for the hook on {target}: {error}") from error
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(owner, parent):
            raise HookError(f"CPU platform: {module_name} has no {parent}; hook on {target} cannot be applied")
        owner = getattr(owner, parent)
    if not hasattr(owner, name):
        raise HookError(f"CPU platform: {owner.__name__} has no {name}; hook on {target} cannot be applied")
    return owner, name, getattr(owner, name)


def missing_parameters(original: Callable[..., Any], replacement: Callable[..., Any]) -> list[str]:
    """Parameters of ``original`` that ``replacement`` would not accept by name."""
    accepted = inspect.signature(replacement).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return []
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    wanted = inspect.signature(original).parameters
    return [name for name, p in wanted.items() if p.kind not in variadic and name not in accepted]


def _holders(value: object) -> list[tuple[types.ModuleType, str]]:
    """Modules that hold ``value`` under some name, through ``from x import y``."""
    found = []
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            found += [(module, name) for name, held in list(vars(module).items()) if held is value]
    return found


def _apply(hook: Hook) -> None:
    owner, name, original = resolve(hook.target)
    if getattr(original, "prfaas_cpu_hook", None) == hook.target:
        return
    missing = missing_parameters(original, hook.replacement)
    if missing:
        raise HookError(
            f"CPU platform: {hook.target} takes {missing}, which our replacement does not know; "
            "this SGLang is not the pinned version"
        )

    @functools.wraps(hook.replacement)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return hook.replacement(*args, **kwargs)

    replacement.prfaas_cpu_hook = hook.target
    replacement.prfaas_cpu_original = original
    setattr(owner, name, replacement)
    for module, held_name in _holders(original):
        setattr(module, held_name, replacement)


def install_hooks() -> None:
    """Apply the whole table, in modules that already imported a target too. Idempotent; raises HookError."""
    for hook in HOOKS:
        _apply(hook)
    hicache.install()
    lora.install()


def verify_hooks() -> None:
    """Raises HookError if a target, or a module that imported one, still has SGLang's own function."""
    for hook in HOOKS:
        owner, name, current = resolve(hook.target)
        if getattr(current, "prfaas_cpu_hook", None) != hook.target:
            raise HookError(f"CPU platform: the hook on {hook.target} is not in place ({hook.reason}); not serving")
        stale = [f"{module.__name__}.{held}" for module, held in _holders(current.prfaas_cpu_original)]
        if stale:
            raise HookError(
                f"CPU platform: {', '.join(stale)} still hold {owner.__name__}.{name} unhooked; not serving"
            )


def register_mla_for_torch_native() -> None:
    """MLA over ``torch_native``: the registry would choose Triton's rule, whose MHA prefill this backend lacks."""
    _, _, registry = resolve("sglang.srt.models.deepseek_common.attention_backend_handler:AttentionBackendRegistry")
    _, _, handler = resolve("sglang.srt.models.deepseek_common.attention_backend_handler:_dispatch_mla_subtype")
    registry.register("torch_native", handler)
