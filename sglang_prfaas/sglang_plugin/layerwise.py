"""Layer-wise sending: the KV of a layer leaves while the next layers of the same prefill chunk are computed.

SGLang calls a sender after a chunk's forward pass. Here every attention layer of the model tells when it has written
its KV; the pages of that layer are handed to the mover at once, for every request of the batch whose decode server is
ready. `send_kv_chunk` then finds them queued, and sends what is left: partial pages, states, auxiliary data. What has
not gone ahead, for whichever reason, is sent after the pass as ever.

Only whole pages go ahead: their content is final once the layer has run. Their slots are taken from the request's row
before the pass, as `send_kv_chunk` takes them after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_prfaas.sglang_plugin.device_events import written_so_far
from sglang_prfaas.sglang_plugin.kv_pages import KV, buffers_of_layers
from sglang_prfaas.sglang_plugin.manager import PrfaasKVManager
from sglang_prfaas.sglang_plugin.sender import PrfaasKVSender
from sglang_prfaas.transport.memory import Indices

logger = logging.getLogger(__name__)

POOLS = ("MHATokenToKVPool", "MLATokenToKVPool", "HybridLinearKVPool", "SWAKVPool")
"""Pools that write a layer's KV in that layer's attention, to buffers whose layers are known."""

FLAGS = ("enable_two_batch_overlap", "enable_pdmux", "enable_torch_compile")
"""Settings of SGLang with which a layer's attention does not run once, in Python, for the whole batch."""


class Chunk(NamedTuple):
    """Whole pages of one request that the running batch completes; the first of them is item `first_item`."""

    sender: PrfaasKVSender
    first_item: int
    pages: Indices


class LayerwiseSending:
    """Installed in the model of a prefill server; belongs to the scheduler's thread."""

    def __init__(self, scheduler: Any, manager: PrfaasKVManager, buffers: dict[int, list[int]]) -> None:
        self._scheduler = scheduler
        self._manager = manager
        self._buffers = buffers
        self._chunks: list[Chunk] = []
        self._handles: list[Any] = []

    def install(self, model: Any) -> None:
        """Have the attention layers of `model` report."""
        from sglang.srt.layers.radix_attention import RadixAttention

        for module in model.modules():
            if isinstance(module, RadixAttention) and module.layer_id in self._buffers:
                self._handles.append(module.register_forward_hook(self._attended))

    def remove(self) -> None:
        """Undo `install`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a batch of the scheduler, and send its layers as they are written."""
        self._chunks = self._chunks_of(batch) if batch.forward_mode.is_extend() else []
        try:
            return original(self._scheduler, batch, *args, **kwargs)
        finally:
            self._chunks = []

    def _chunks_of(self, batch: Any) -> list[Chunk]:
        found = (self._chunk_of(request) for request in batch.reqs)
        return [chunk for chunk in found if chunk is not None]

    def _chunk_of(self, request: Any) -> Chunk | None:
        """The whole pages that `send_kv_chunk` will hand over after this pass; None where there are none yet."""
        from sglang.srt.disaggregation.prefill import kv_to_page_indices

        sender = request.disagg_kv_sender
        if not isinstance(sender, PrfaasKVSender) or request.pending_bootstrap or not sender.sending:
            return None
        allocator = self._scheduler.token_to_kv_pool_allocator
        page_tokens = allocator.page_size
        prefix = request.disagg_decode_prefix_len
        start = prefix + sender.handed_over_pages * page_tokens
        stop = min(request.extend_end, len(request.origin_input_ids))
        stop -= stop % page_tokens
        if prefix % page_tokens or start != request.start_send_idx or stop <= start:
            return None
        row = self._scheduler.req_to_token_pool.req_to_token[request.kv.req_pool_idx, start:stop]
        pages = kv_to_page_indices(allocator.translate_kv_indices_for_transfer(row), page_tokens)
        self._scheduler.disagg_prefill_pending_chunk_rids.add(request.rid)
        return Chunk(sender, sender.handed_over_pages, self._manager.memory.checked(KV, pages))

    def _attended(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook: attention of a layer was run, or put on the device's stream, its KV written before."""
        if not self._chunks:
            return
        ready = written_so_far()
        for chunk in self._chunks:
            chunk.sender.send_layer(chunk.first_item, chunk.pages, self._buffers[module.layer_id], ready)


def start(scheduler: Any, manager: PrfaasKVManager) -> LayerwiseSending | None:
    """Begin to send layer by layer, where SGLang's mode permits it; else log why not."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    problem = obstacle(scheduler, manager, pool)
    if problem:
        logger.info("prfaas: KVCache is sent chunk by chunk, not layer by layer: %s", problem)
        return None
    sending = LayerwiseSending(scheduler, manager, buffers_of_layers(pool, manager.kv_args.kv_layer_ids))
    sending.install(scheduler.tp_worker.model_runner.model)
    logger.info("prfaas: KVCache is sent layer by layer")
    return sending


def obstacle(scheduler: Any, manager: PrfaasKVManager, pool: Any) -> str:
    """Why layers cannot be sent as they are written; an empty string where they can."""
    if manager.config.layerwise == "off":
        return "transport.layerwise is off"
    if scheduler.enable_overlap:
        return "the overlap schedule is on; --disable-overlap-schedule turns it off"
    if not scheduler.spec_algorithm.is_none():
        return "speculative decoding is on"
    for flag in FLAGS:
        if getattr(manager.server_args, flag):
            return f"--{flag.replace('_', '-')} is on"
    from sglang.srt.environ import envs

    if envs.SGLANG_DISAGG_STAGING_BUFFER.get():
        return "the staging buffer is on"
    graph = _prefill_graph()
    if graph != "disabled":
        return f"prefill runs in CUDA graphs ({graph}); --disable-prefill-cuda-graph turns them off"
    for kind in (pool, getattr(pool, "full_kv_pool", pool)):
        if type(kind).__name__ not in POOLS:
            return f"nothing is known of the layers of a {type(kind).__name__}"
    if not buffers_of_layers(pool, manager.kv_args.kv_layer_ids):
        return "the buffers of the KVCache cannot be assigned to layers"
    return ""


def _prefill_graph() -> str:
    from sglang.srt.runtime_context import get_device, get_exec

    if str(get_device().device) != "cuda":
        return "disabled"
    return str(get_exec().graph.cuda_graph_config.prefill.backend)
