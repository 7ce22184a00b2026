"""What is refused before routing: wrong methods, administration endpoints, unknown routes."""

from __future__ import annotations

from sglang_prfaas.core.request import Route
from sglang_prfaas.http import HttpError, Request
from sglang_prfaas.router.body import Endpoint

ROUTE_HEADER = b"x-prfaas-route"

# Served over prefill and decode.
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/generate": "generate",
}
_METHODS = {
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/generate": ("POST", "PUT"),
    "/v1/models": ("GET", "HEAD"),
    "/health": ("GET", "HEAD"),
    "/metrics": ("GET", "HEAD"),
    "/policy": ("GET", "HEAD"),
    "/decisions": ("GET", "HEAD"),
    "/cache": ("GET", "HEAD"),
}

# SGLang 0.5.23's endpoints of level ADMIN_OPTIONAL: they change or stop a server, or show its weights.
_ADMIN = frozenset(
    (
        "abort_request",
        "add_external_corpus",
        "begin_weight_update",
        "configure_logging",
        "continue_generation",
        "destroy_weights_update_group",
        "dump_expert_distribution_record",
        "end_weight_update",
        "flush_cache",
        "freeze_gc",
        "get_remote_instance_transfer_engine_info",
        "get_weights_by_name",
        "init_weights_send_group_for_remote_instance",
        "init_weights_update_group",
        "list_external_corpora",
        "load_lora_adapter",
        "load_lora_adapter_from_tensors",
        "pause_generation",
        "pd_role_switch",
        "release_memory_occupation",
        "remote_instance_transfer_engine_info",
        "remove_external_corpus",
        "resume_memory_occupation",
        "send_weights_to_remote_instance",
        "set_internal_state",
        "set_trace_level",
        "slow_down",
        "start_expert_distribution_record",
        "start_profile",
        "stop_expert_distribution_record",
        "stop_profile",
        "unload_lora_adapter",
        "update_weight_version",
        "update_weights_from_disk",
        "update_weights_from_distributed",
        "update_weights_from_ipc",
        "update_weights_from_tensor",
        "weights_checker",
    )
)
_ADMIN_TREES = ("hicache", "dumper")

# Headers by which SGLang lets a router set bootstrap fields; a client must not.
DROPPED_REQUEST_HEADERS = (b"x-override-", b"x-prfaas-")


def check_method(request: Request) -> None:
    """Raises HttpError 405 for a wrong method on an endpoint that the router serves itself."""
    allowed = _METHODS.get(request.path)
    if allowed is not None and request.method not in allowed:
        raise HttpError(
            405,
            f"{request.path} takes {' or '.join(allowed)}, got {request.method}.",
            code="method_not_allowed",
            headers=((b"allow", ", ".join(allowed).encode()),),
        )


def check_passthrough(path: str, *, allow_admin: bool) -> None:
    """Raises HttpError 403 for administration endpoints, 400 for paths that could hide one."""
    segments = [s for s in path.split("/") if s]
    if not path.startswith("/") or ".." in segments or "." in segments:
        raise HttpError(400, f"The path {path!r} is not valid.", code="invalid_path")
    if allow_admin or not segments:
        return
    if segments[0] in _ADMIN_TREES or segments[0] in _ADMIN:
        raise HttpError(
            403,
            f"{path} administers a server: call it on the server itself, or set router.allow_admin = true.",
            code="admin_endpoint",
        )


def forced_route(request: Request) -> Route | None:
    """The route a client asks for. Raises HttpError 400 for any value but local and prfaas."""
    value = request.header(ROUTE_HEADER)
    if value is None:
        return None
    text = value.strip().lower()
    if text == b"local":
        return "local"
    if text == b"prfaas":
        return "prfaas"
    got = value[:40].decode("latin-1")
    raise HttpError(400, f"x-prfaas-route must be local or prfaas, got {got!r}.", code="invalid_route")


def newest_wanted(request: Request) -> int | None:
    """`newest` of `GET /decisions?newest=N`; None without it. Raises HttpError 400 for anything but a number."""
    for part in request.query.split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"newest":
            if not value.isdigit() or len(value) > 9:
                got = value[:40].decode("latin-1")
                raise HttpError(400, f"newest must be a number, got {got!r}.", code="invalid_query")
            return int(value)
    return None
