"""Every place where the transfer backend touches SGLang, in one table with its reason.

SGLang logs and swallows the errors of plugins. So the table is applied and checked here: where an entry does not hold,
`install` raises, and `plugin.register` makes sure that no server starts with half of it.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.sglang_plugin import adapter_ids

BACKEND = "prfaas"
TESTED_SGLANG = ("0.5.23",)


class Hook(NamedTuple):
    """One target in SGLang: what is done to it, the parameters it must have, and why."""

    target: str
    kind: str
    parameters: tuple[str, ...]
    reason: str


GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"
SEND_KV_CHUNK = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.send_kv_chunk"
RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
INIT_KV_MANAGER = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue._init_kv_manager"
ADAPTER_ID = "sglang.srt.lora.lora_registry.LoRARef.deterministic_id"
CHOICES = "sglang.srt.arg_groups.choices.add_disagg_transfer_backend_choices"
BACKENDS = "sglang.srt.disaggregation.utils.TransferBackend"

HOOKS = (
    Hook(CHOICES, "call", ("iterable",), "makes --disaggregation-transfer-backend prfaas parse"),
    Hook(BACKENDS, "extend", (), "the scheduler and the tokenizer manager look the backend up by value"),
    Hook(
        GET_KV_CLASS,
        "around",
        ("transfer_backend", "class_type"),
        "hands out our manager, sender, receiver and bootstrap directory",
    ),
    Hook(
        SEND_KV_CHUNK,
        "before",
        ("self", "req", "last_chunk", "end_idx"),
        "the only place where a request's queue and prefill times and its sender are at hand",
    ),
    Hook(
        INIT_KV_MANAGER,
        "around",
        ("self",),
        "the only place where the manager and the scheduler's model meet; layers of the model report to it",
    ),
    Hook(
        RUN_BATCH,
        "around",
        ("self", "batch", "pp_proxy_tensors"),
        "tells which requests' layers are written by the forward pass that begins",
    ),
    Hook(
        ADAPTER_ID,
        "around",
        ("lora_name", "lora_path"),
        "names a LoRA adapter's cached pages, by name and path only: stored pages would outlive the adapter's weights",
    ),
)


def problems_with(hooks: tuple[Hook, ...] = HOOKS) -> list[str]:
    """What about the installed SGLang does not fit the table: missing targets, other parameters."""
    found = []
    for hook in hooks:
        try:
            target = pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError) as error:
            found.append(f"{hook.target} is missing ({error}); it {hook.reason}")
            continue
        if hook.kind in ("around", "before", "override"):
            names = tuple(inspect.signature(inspect.unwrap(target)).parameters)
            if names != hook.parameters:
                found.append(f"{hook.target} takes ({', '.join(names)}), expected ({', '.join(hook.parameters)})")
    return found


def _get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """AROUND `get_kv_class`: our classes for our backend, the original's for every other."""
    if getattr(transfer_backend, "value", None) != BACKEND or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    from sglang_prfaas.sglang_plugin.backend import CLASSES

    return CLASSES[class_type.value]


def _note_request_times(scheduler: Any, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
    """BEFORE `send_kv_chunk`: tell our sender how long the request queued and computed."""
    sender = getattr(req, "disagg_kv_sender", None)
    note = getattr(sender, "note_times", None)
    if not last_chunk or note is None:
        return
    import time

    stats = req.time_stats
    entry_s = stats.bootstrap_done_time or stats.wait_queue_entry_time
    forward_s = stats.forward_entry_time
    # SGLang's time stats are of this clock.
    note(max(0.0, forward_s - entry_s) if entry_s else 0.0, max(0.0, time.perf_counter() - forward_s))


def _init_kv_manager(original: Callable[..., Any], queue: Any) -> Any:
    """AROUND `_init_kv_manager`: a manager of ours sends layer by layer, where it can."""
    manager = original(queue)
    if hasattr(manager, "layerwise"):
        from sglang_prfaas.sglang_plugin import layerwise

        manager.layerwise = layerwise.start(queue.scheduler, manager)
    return manager


def _run_batch(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `run_batch`: layers of a prefill server are sent as they are written."""
    queue = getattr(scheduler, "disagg_prefill_bootstrap_queue", None)
    layerwise = getattr(getattr(queue, "kv_manager", None), "layerwise", None)
    if layerwise is None:
        return original(scheduler, batch, *args, **kwargs)
    return layerwise.run(original, batch, *args, **kwargs)


def _add_backend(enum_class: Any) -> None:
    """Add the member to SGLang's enumeration of backends."""
    if BACKEND in enum_class._value2member_map_:
        return
    member = object.__new__(enum_class)
    member._name_ = BACKEND.upper()
    member._value_ = BACKEND
    enum_class._member_map_[member._name_] = member
    enum_class._value2member_map_[BACKEND] = member
    enum_class._member_names_.append(member._name_)


def install() -> None:
    """Apply the whole table. Raises LaunchError naming every entry that does not hold."""
    found = problems_with()
    if found:
        raise LaunchError("\n".join(found))
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choices = pkgutil.resolve_name(CHOICES)
    choices([BACKEND])
    _add_backend(pkgutil.resolve_name(BACKENDS))
    HookRegistry.register(GET_KV_CLASS, _get_kv_class, HookType.AROUND)
    HookRegistry.register(SEND_KV_CHUNK, _note_request_times, HookType.BEFORE)
    HookRegistry.register(INIT_KV_MANAGER, _init_kv_manager, HookType.AROUND)
    HookRegistry.register(RUN_BATCH, _run_batch, HookType.AROUND)
    HookRegistry.register(ADAPTER_ID, adapter_ids.deterministic_id, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = unapplied()
    if missing:
        raise LaunchError("\n".join(f"the hook on {target} was not applied" for target in missing))


def unapplied() -> list[str]:
    """Targets of the table that SGLang did not patch."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [
        hook.target for hook in HOOKS if hook.kind in ("around", "before") and hook.target not in HookRegistry._patched
    ]
