"""Where `--linear-attn-prefill-backend prfaas` touches SGLang, in one table with its reasons.

The entries of `ENTRY` are in place in every server. Those of `KERNELS` follow when a model's linear attention is set up
and the resolved flag says prfaas; where one does not hold, that raises, and the server does not start.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from typing import Any

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.sglang_plugin.hooks import Hook, problems_with

logger = logging.getLogger(__name__)

NAME = "prfaas"
FLAG = "--linear-attn-prefill-backend"

_LINEAR = "sglang.srt.layers.attention.linear"
CHOICES = "sglang.srt.arg_groups.choices.add_linear_attn_kernel_backend_choices"
RESOLVE = f"{_LINEAR}.utils.resolve_linear_attn_backends"
KDA_DISPATCHER = f"{_LINEAR}.kda_backend.KDAKernelDispatcher.__init__"
GDN_DISPATCHER = f"{_LINEAR}.gdn_backend.GDNKernelDispatcher.__init__"
LIGHTNING_ENTRY = f"{_LINEAR}.lightning_backend.LightningAttentionBackend._linear_attention_entry"

_DISPATCHER = ("self", "decode_backend", "prefill_backend", "verify_backend")
_EXTEND = ("self", "q", "k", "v", "g", "beta", "ssm_states", "cache_indices", "query_start_loc")
_KDA_GATE = ("A_log", "dt_bias", "lower_bound", "beta_is_raw", "return_intermediate_states")

ENTRY = (
    Hook(CHOICES, "call", ("iterable",), f"makes {FLAG} {NAME} parse"),
    Hook(
        RESOLVE,
        "around",
        ("prefill_default",),
        "is called with the resolved flags before any linear attention is built, however they were given",
    ),
)
KERNELS = (
    Hook(KDA_DISPATCHER, "around", _DISPATCHER, "raises for names it does not know; gets our kernel for prefill"),
    Hook(GDN_DISPATCHER, "around", _DISPATCHER, "raises for names it does not know; gets our kernel for prefill"),
    Hook(
        LIGHTNING_ENTRY,
        "around",
        (
            *("self", "q", "k", "v", "kv_cache", "state_indices_tensor", "metadata", "layer", "mask", "temp_cache"),
            *("intermediate_state_indices", "track_lens", "track_state_indices"),
        ),
        "Lightning has no dispatcher: this method calls seg_la_fwd whatever the flag says",
    ),
    Hook(
        f"{_LINEAR}.kernels.kda_triton.TritonKDAKernel.extend",
        "override",
        (*_EXTEND, *_KDA_GATE, "kwargs"),
        "is what our KDA kernel overrides and falls back to",
    ),
    Hook(
        f"{_LINEAR}.kernels.gdn_triton.TritonGDNKernel.extend",
        "override",
        (*_EXTEND, "inplace_update", "kwargs"),
        "is what our GDN kernel overrides and falls back to",
    ),
)


def install() -> None:
    """Make the flag parse and be followed. Raises LaunchError naming every entry that does not hold."""
    _check(ENTRY)
    pkgutil.resolve_name(CHOICES)([NAME])
    _around({RESOLVE: _resolve})


def install_kernels() -> None:
    """Put our prefill kernels into SGLang's dispatchers. Idempotent. Raises LaunchError as :func:`install` does."""
    _check(KERNELS)
    from sglang_prfaas.sglang_plugin.linear_attention.kernels import (
        PrfaasGDNKernel,
        PrfaasKDAKernel,
        lightning_entry,
    )

    _around(
        {
            KDA_DISPATCHER: _dispatcher("KDA", PrfaasKDAKernel),
            GDN_DISPATCHER: _dispatcher("GDN", PrfaasGDNKernel),
            LIGHTNING_ENTRY: lightning_entry,
        }
    )


def _check(table: tuple[Hook, ...]) -> None:
    found = problems_with(table)
    if found:
        raise LaunchError("\n".join(found))


def _around(hooks: dict[str, Callable[..., Any]]) -> None:
    """Register AROUND hooks that are not in place yet; raises LaunchError where SGLang did not apply one."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in hooks.items():
        if target not in HookRegistry._patched:
            HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = [target for target in hooks if target not in HookRegistry._patched]
    if missing:
        raise LaunchError("\n".join(f"the hook on {target} was not applied" for target in missing))


def _resolve(original: Callable[..., Any], prefill_default: str | None = None) -> Any:
    """AROUND `resolve_linear_attn_backends`: follow the flag, or refuse where it asks for what we do not have."""
    from sglang.srt.runtime_context import get_exec

    flags = get_exec().mamba
    wrong = {
        "--linear-attn-backend": flags.linear_attn_backend,
        "--linear-attn-decode-backend": flags.linear_attn_decode_backend,
        "--linear-attn-verify-backend": flags.linear_attn_verify_backend,
    }
    for flag, value in wrong.items():
        if value == NAME:
            raise LaunchError(f"{flag} {NAME}: {NAME} computes prefill only; write {FLAG} {NAME} instead")
    if flags.linear_attn_prefill_backend == NAME:
        try:
            install_kernels()
        except LaunchError as error:
            raise LaunchError(f"{FLAG} {NAME} cannot be served by this SGLang:\n{error}") from error
        logger.info("prfaas: KDA, GDN and Lightning prefill by prfaas_kernels")
    return original(prefill_default=prefill_default)


def _dispatcher(operator: str, kernel: Callable[[], Any]) -> Callable[..., None]:
    """AROUND a dispatcher's ``__init__``: built with Triton for prefill, then given our kernel instead.

    SGLang calls every name it does not know "custom", and this hook is in place only where the flag says prfaas. A
    backend that SGLang knows was not chosen by the flag, and is left alone.
    """

    def init(
        original: Callable[..., None],
        self: Any,
        decode_backend: Any,
        prefill_backend: Any,
        verify_backend: Any = None,
    ) -> None:
        if not prefill_backend.is_custom():
            return original(self, decode_backend, prefill_backend, verify_backend)
        original(self, decode_backend, type(prefill_backend).TRITON, verify_backend)
        self.extend_kernel = kernel()
        logger.info("prfaas: the %s dispatcher has %s for prefill", operator, type(self.extend_kernel).__name__)
        return None

    return init
