"""The prefill side of one request, in SGLang's terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.disaggregation.base.conn import BaseKVSender, KVPoll, KVTransferMetric

from sglang_prfaas.errors import LocalError, PrfaasError
from sglang_prfaas.sglang_plugin.device_events import written_so_far
from sglang_prfaas.sglang_plugin.kv_pages import KV, flat_indices
from sglang_prfaas.sglang_plugin.manager import PrfaasKVManager
from sglang_prfaas.sglang_plugin.page_progress import PageProgress
from sglang_prfaas.transport.fan_out import FanOut
from sglang_prfaas.transport.memory import Indices
from sglang_prfaas.transport.paging import WINDOWS, PromptPages
from sglang_prfaas.transport.transfer import FINAL, State

_POLL = {
    State.WAITING: KVPoll.Bootstrapping,
    State.READY: KVPoll.WaitingForInput,
    State.SENDING: KVPoll.Transferring,
    State.DONE: KVPoll.Success,
    State.FAILED: KVPoll.Failed,
}


class TransferFailedError(PrfaasError):
    """A request's transfer failed. `is_from_another_rank`: this rank was fine, another one of its group was not."""

    def __init__(self, room: int, reason: str, is_from_another_rank: bool = False) -> None:
        self.failure_reason = reason
        self.is_from_another_rank = is_from_another_rank
        super().__init__(f"room {room}: {reason}")


class PrfaasKVSender(BaseKVSender):
    """Sends one request's pages, layer by layer or chunk by chunk, then its state and auxiliary data."""

    def __init__(
        self,
        mgr: PrfaasKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ):
        assert mgr.send_mover is not None, "a sender needs a prefill manager"
        self.kv_mgr = mgr
        self.bootstrap_room = bootstrap_room
        self._transfer: FanOut | None = None
        self._failure = ""
        self._aux_index = 0
        self._pages = PageProgress(len(mgr.layout.components[KV].item_bytes))
        self._handed_over_pages = 0
        self._prompt_pages: PromptPages | None = None
        self._ahead_bytes = 0
        self._finished_s = 0.0
        self._queue_s = 0.0
        self._prefill_s = 0.0
        self._logged = False
        self._early_send_wait_event: Any = None
        try:
            self._transfer = FanOut(mgr.send_mover, bootstrap_room)
        except LocalError as error:
            self._failure = str(error)

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """Decode is ready and prefill will send `num_kv_indices` pages."""
        self._aux_index = aux_index or 0
        if self._transfer is not None:
            prompt = self._prompt()
            self._transfer.start(prompt.agreed(num_kv_indices) if prompt is not None else num_kv_indices)

    def _prompt(self) -> PromptPages | None:
        """The request's pages as decode counts them, once it has asked."""
        if self._prompt_pages is None and self._transfer is not None:
            self._prompt_pages = self._transfer.prompt_pages
        return self._prompt_pages

    def pop_decode_prefix_len(self) -> int:
        """Tokens that decode has already, as far as they fill pages here; prefill sends only the pages after them."""
        prompt = self._prompt()
        return prompt.first_token if prompt is not None else 0

    def should_send_kv_chunk(self, num_pages: int, last_chunk: bool) -> bool:
        """The last chunk goes out even without pages: state and auxiliary data travel with it."""
        return num_pages > 0 or last_chunk

    def send(self, kv_indices: Any, state_indices: list[Any] | None = None, num_kv_tokens: int | None = None) -> None:
        """Queue the pages of one prefill chunk; with `state_indices` (the last chunk) all the rest too."""
        transfer, prompt = self._transfer, self._prompt()
        if transfer is None or prompt is None:
            return
        ready = self._ready()
        try:
            pages = self.kv_mgr.memory.checked(KV, flat_indices(kv_indices))
            first, items = prompt.units(self._handed_over_pages, pages, last=state_indices is not None)
            self._handed_over_pages += len(pages)
            with transfer.locked():
                if self._pages.hand_over(items):
                    transfer.moved()
            for first_item, buffers in self._pages.due(first + len(items)):
                transfer.send(KV, first_item, items[first_item - first :], ready, buffers)
            if state_indices is not None:
                self._send_rest(transfer, prompt, state_indices, ready)
        except LocalError as error:
            transfer.abort(str(error))

    @property
    def sending(self) -> bool:
        """Whether decode is ready and the transfer is under way."""
        return self._transfer is not None and self._transfer.state is State.SENDING

    @property
    def handed_over_pages(self) -> int:
        """Pages that `send` was called with so far."""
        return self._handed_over_pages

    def send_layer(self, first: int, pages: Indices, buffers: Sequence[int], ready: Callable[[], None]) -> None:
        """Queue pages of the request, page `first` and those after it, in some layer's `buffers` only: those that went
        neither this way nor through `send`."""
        transfer, prompt = self._transfer, self._prompt()
        if transfer is None or prompt is None or not self.sending:
            return
        layout = self.kv_mgr.layout
        first_unit, items = prompt.units(first, pages)
        try:
            for first_item, group in self._pages.due(first_unit + len(items), buffers):
                rest = items[first_item - first_unit :]
                for slots in transfer.send(KV, first_item, rest, ready, group):
                    self._pages.ran_ahead(first_item, slots)
                page_bytes = sum(layout.components[KV].item_bytes[buffer] for buffer in group)
                self._ahead_bytes += len(rest) * page_bytes * prompt.unit_tokens // layout.page_tokens
        except LocalError as error:
            transfer.abort(str(error))

    def _send_rest(
        self, transfer: FanOut, prompt: PromptPages, state_indices: list[Any], ready: Callable[[], None]
    ) -> None:
        expected = transfer.expected
        if expected is None:
            return
        if self._pages.handed_over != expected.counts[KV]:
            raise LocalError(
                f"prefill sent {self._pages.handed_over} items of {prompt.unit_tokens} tokens, decode reserved "
                f"{expected.counts[KV]}"
            )
        for component, values in enumerate([*state_indices, [self._aux_index]], 1):
            items = self.kv_mgr.memory.checked(component, flat_indices(values))
            name = self.kv_mgr.layout.components[component].name
            if name in WINDOWS:
                items = prompt.window(component, items, self._handed_over_pages)
            if len(items) != expected.counts[component]:
                raise LocalError(
                    f"prefill has {len(items)} items of {name}, decode reserved {expected.counts[component]}"
                )
            if len(items):
                transfer.send(component, 0, items, ready)
        transfer.finish()
        self._finished_s = self.kv_mgr.clock.now_s()

    def _ready(self) -> Callable[[], None]:
        """What a mover thread calls before it reads the pages: waits until the device has written them."""
        event, self._early_send_wait_event = self._early_send_wait_event, None
        if event is None:
            return written_so_far()
        wait: Callable[[], None] = event.synchronize
        return wait

    def note_times(self, queue_s: float, prefill_s: float) -> None:
        """Seconds this request queued and computed, for the transfer log."""
        self._queue_s, self._prefill_s = queue_s, prefill_s

    def poll(self) -> int:
        transfer = self._transfer
        if transfer is None:
            return KVPoll.Failed
        config = self.kv_mgr.config
        try:
            late = transfer.late(config.waiting_timeout_s, config.transfer_timeout_s)
            if late:
                transfer.abort(late)
            state = transfer.state
        except LocalError as error:
            transfer.abort(str(error))
            state = transfer.state
        if state in FINAL and not self._logged:
            self._log(transfer)
        if state is State.READY and not transfer.admitted:
            return KVPoll.Bootstrapping
        return _POLL[state]

    def get_transfer_metric(self) -> KVTransferMetric:
        transfer = self._transfer
        if transfer is None or transfer.state is not State.DONE:
            return KVTransferMetric()
        return KVTransferMetric(
            transfer_latency_s=max(0.0, transfer.progress_s - transfer.first_byte_s),
            alloc_latency_s=max(0.0, transfer.ready_s - transfer.first.created_s),
            transfer_total_bytes=transfer.bytes,
        )

    def failure_exception(self) -> None:
        """Raise the reason. Ends the transfer first where it was another rank that failed."""
        transfer = self._transfer
        if transfer is None:
            raise TransferFailedError(self.bootstrap_room, self._failure)
        if transfer.live:
            transfer.abort("another rank of the prefill server failed")
            self._log(transfer)
            raise TransferFailedError(self.bootstrap_room, transfer.reason, is_from_another_rank=True)
        reason = transfer.reason or "another rank of the prefill server failed"
        self.clear()
        raise TransferFailedError(self.bootstrap_room, reason)

    def abort(self) -> None:
        """End the request: decode is told, the pages are not read any more."""
        if self._transfer is not None:
            self._transfer.abort("the prefill leg of the request was aborted")
            self._log(self._transfer)
            self._transfer.release()

    def clear(self) -> None:
        """Forget the request."""
        if self._transfer is not None:
            self._transfer.release()

    def _log(self, transfer: FanOut) -> None:
        if self._logged:
            return
        self._logged = True
        created_s = transfer.first.created_s
        started = transfer.ready_s or created_s
        self.kv_mgr.log_transfer(
            role="prefill",
            room=self.bootstrap_room,
            status=transfer.state.value,
            reason=transfer.reason,
            bytes=transfer.bytes,
            wire_bytes=transfer.wire_bytes,
            codec=transfer.first.codec,
            pages=self._handed_over_pages,
            ahead_bytes=self._ahead_bytes,
            cached_prefix_tokens=transfer.expected.cached_prefix_tokens if transfer.expected is not None else 0,
            resent_chunks=transfer.resent_chunks,
            corrupt_chunks=transfer.corrupt_chunks,
            handshake_s=started - created_s,
            queue_s=self._queue_s,
            prefill_s=self._prefill_s,
            transfer_s=max(0.0, transfer.last_byte_s - transfer.first_byte_s),
            exposed_s=max(0.0, transfer.progress_s - self._finished_s) if self._finished_s else 0.0,
        )
