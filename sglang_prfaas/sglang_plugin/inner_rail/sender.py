"""The prefill side of one request where the site has an inner rail: sent over the one that decode asks on."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferMetric
from sglang.srt.disaggregation.common.conn import KVTransferError

from sglang_prfaas.sglang_plugin.inner_rail.rail import Rail
from sglang_prfaas.sglang_plugin.manager import PrfaasKVManager
from sglang_prfaas.sglang_plugin.sender import PrfaasKVSender, TransferFailedError


class RailedSender(PrfaasKVSender):
    """Waits for decode on both movers; what it hears first is used, the other is let go."""

    def __init__(
        self,
        mgr: PrfaasKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ):
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)
        assert mgr.rail is not None, "a railed sender needs a rail"
        self._rail: Rail = mgr.rail
        self._name = self._rail.rooms.take(bootstrap_room)
        # As if the DP rank had been asked for: it is found by prfaas, and the rail has no registry to write it to.
        self._by_rail = self._rail.sender(self._rail.manager, bootstrap_addr, self._name, True)
        self._offered = True
        """Whether both are still open."""
        self._on_rail = False
        self._holds_name = True
        self._created_s = mgr.clock.now_s()
        self._ready_s = 0.0
        self._rail_pages = 0
        self._rail_prefix_tokens = 0
        self._rail_first_s = 0.0

    def poll(self) -> int:
        if self._on_rail:
            return self._poll_rail()
        status = super().poll()
        if not self._offered:
            return status
        if status != KVPoll.Bootstrapping:
            self._withdraw()
        elif self._by_rail.poll() != KVPoll.Bootstrapping:
            self._take_rail()
            return self._poll_rail()
        return status

    def _withdraw(self) -> None:
        """Decode has asked over prfaas."""
        self._offered = False
        self._by_rail.clear()
        self._leave()

    def _take_rail(self) -> None:
        """Decode has asked over the rail."""
        self._offered = False
        self._on_rail = True
        self._ready_s = self.kv_mgr.clock.now_s()
        if self._transfer is not None:
            self._transfer.release()
            self._transfer = None

    def _poll_rail(self) -> int:
        status = self._by_rail.poll()
        if status in (KVPoll.Success, KVPoll.Failed):
            self._log_rail("done" if status == KVPoll.Success else "failed")
        return int(status)

    def _leave(self) -> None:
        if self._holds_name:
            self._holds_name = False
            self._rail.rooms.give_back(self.bootstrap_room)

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        if self._on_rail:
            self._by_rail.init(num_kv_indices, aux_index)
        else:
            super().init(num_kv_indices, aux_index)

    def pop_decode_prefix_len(self) -> int:
        if not self._on_rail:
            return super().pop_decode_prefix_len()
        self._rail_prefix_tokens = self._rail_prefix_tokens or self._by_rail.pop_decode_prefix_len()
        return self._rail_prefix_tokens

    def should_send_kv_chunk(self, num_pages: int, last_chunk: bool) -> bool:
        if self._on_rail:
            return bool(self._by_rail.should_send_kv_chunk(num_pages, last_chunk))
        return super().should_send_kv_chunk(num_pages, last_chunk)

    def get_max_transfer_tokens(self) -> int | None:
        """Tokens of one `send` at most; None: any number."""
        return self._by_rail.get_max_transfer_tokens() if self._on_rail else super().get_max_transfer_tokens()

    def send(self, kv_indices: Any, state_indices: list[Any] | None = None, num_kv_tokens: int | None = None) -> None:
        if not self._on_rail:
            super().send(kv_indices, state_indices, num_kv_tokens)
            return
        self._rail_first_s = self._rail_first_s or self.kv_mgr.clock.now_s()
        self._rail_pages += len(kv_indices)
        self._by_rail._early_send_wait_event, self._early_send_wait_event = self._early_send_wait_event, None
        self._by_rail.send(kv_indices, state_indices, num_kv_tokens=num_kv_tokens)
        if state_indices is not None:
            self._finished_s = self.kv_mgr.clock.now_s()

    def get_transfer_metric(self) -> KVTransferMetric:
        return self._by_rail.get_transfer_metric() if self._on_rail else super().get_transfer_metric()

    def failure_exception(self) -> None:
        if not self._on_rail:
            self._drop_offer()
            super().failure_exception()
            return
        try:
            self._by_rail.failure_exception()
        except KVTransferError as error:
            self._log_rail("failed", error.failure_reason)
            self._leave()
            raise TransferFailedError(self.bootstrap_room, error.failure_reason, error.is_from_another_rank) from None

    def abort(self) -> None:
        """End the request: decode is told."""
        if self._on_rail:
            reason = "the prefill leg of the request was aborted"
            self._rail.manager.conclude_failure(bootstrap_room=self._name, failure_reason=reason)
            self._by_rail.abort()
            self._log_rail("failed", reason)
            self._by_rail.clear()
            self._leave()
        else:
            self._drop_offer()
            super().abort()

    def clear(self) -> None:
        if self._on_rail:
            self._by_rail.clear()
            self._leave()
        else:
            self._drop_offer()
            super().clear()

    def _drop_offer(self) -> None:
        if self._offered:
            self._withdraw()

    def _log_rail(self, status: str, reason: str = "") -> None:
        if self._logged:
            return
        self._logged = True
        now_s = self.kv_mgr.clock.now_s()
        self.kv_mgr.log_transfer(
            role="prefill",
            room=self.bootstrap_room,
            rail=self._rail.kind,
            status=status,
            reason=reason or self._rail.manager.failure_records.get(self._name, ""),
            bytes=int(self._by_rail.get_transfer_metric().transfer_total_bytes or 0),
            pages=self._rail_pages,
            cached_prefix_tokens=self._rail_prefix_tokens,
            handshake_s=self._ready_s - self._created_s,
            queue_s=self._queue_s,
            prefill_s=self._prefill_s,
            transfer_s=now_s - self._rail_first_s if self._rail_first_s else 0.0,
            exposed_s=now_s - self._finished_s if self._finished_s else 0.0,
        )
