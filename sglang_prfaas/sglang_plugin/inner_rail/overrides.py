"""What of SGLang's backends a rail replaces or calls beyond their interfaces; checked where one is started."""

from __future__ import annotations

from sglang_prfaas.sglang_plugin.hooks import Hook

_COMMON = "sglang.srt.disaggregation.common.conn."

OVERRIDES = (
    Hook(
        _COMMON + "CommonKVManager.register_to_bootstrap",
        "override",
        ("self",),
        "ranks of the rail are found through prfaas's directory",
    ),
    Hook(
        _COMMON + "CommonKVManager._start_heartbeat_checker_thread",
        "override",
        ("self",),
        "the prfaas session tells whether prefill lives",
    ),
    Hook(
        _COMMON + "CommonKVManager._resolve_rank_mapping",
        "override",
        ("self", "info"),
        "maps the ranks of prfaas's directory",
    ),
    Hook(
        _COMMON + "CommonKVManager._handle_node_failure",
        "override",
        ("self", "failed_bootstrap_addr"),
        "drops what is known of a prefill server that has restarted",
    ),
    Hook(
        _COMMON + "CommonKVReceiver._get_bootstrap_info_from_server",
        "override",
        ("self", "prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"),
        "ranks of the rail are found through prfaas's directory",
    ),
)
