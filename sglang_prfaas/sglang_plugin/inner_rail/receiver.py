"""The decode side of one request where the site has an inner rail: asked for over the rail where prefill is of this
site and has it, with pages of the same size, else over prfaas."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import KVTransferError

from sglang_prfaas.errors import LocalError
from sglang_prfaas.sglang_plugin.inner_rail.choice import takes_rail
from sglang_prfaas.sglang_plugin.inner_rail.rail import Rail
from sglang_prfaas.sglang_plugin.kv_pages import KV, component_indices
from sglang_prfaas.sglang_plugin.manager import PrfaasKVManager
from sglang_prfaas.sglang_plugin.receiver import PrfaasKVReceiver
from sglang_prfaas.sglang_plugin.sender import TransferFailedError


class _HeldPages:
    """What SGLang asks a manager for while pages of a failed request wait until prefill writes them no more."""

    enable_deferred_decode_kv_release: bool

    def __init__(self, manager: Any, name: int) -> None:
        self._manager = manager
        self._name = name
        self.enable_deferred_decode_kv_release = manager.enable_deferred_decode_kv_release

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        return bool(self._manager.is_abort_release_safe(self._name, required_acks))

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        self._manager.clear_deferred_abort_state(self._name)


class RailedReceiver(PrfaasKVReceiver):
    """Shakes hands over prfaas in any case; then the pages are asked for over one of both."""

    def __init__(self, mgr: PrfaasKVManager, bootstrap_addr: str, bootstrap_room: int | None = None):
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        assert mgr.rail is not None, "a railed receiver needs a rail"
        self._rail: Rail = mgr.rail
        self._name = self._rail.rooms.take(self.bootstrap_room)
        self._by_rail: Any = None
        self._holds_name = True
        self._counts: list[int] = []
        self._asked_s = 0.0

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: KVTransferDestination = KVTransferDestination.DEVICE,
    ) -> None:
        directory = self._directory
        proven = [session.server.site for session in self._sessions]
        rail = self._rail
        here = self._manager.layout.page_tokens
        sizes = here, (directory.page_tokens if directory is not None else 0) or here
        if self._failure or directory is None or not takes_rail(rail.kind, rail.site, self._ranks, proven, sizes):
            super().send_metadata(kv_indices, aux_index, state_indices, decode_prefix_len, destination)
            return
        self._cached_prefix_tokens = decode_prefix_len or 0
        self._counts = [len(part) for part in component_indices(kv_indices, state_indices, aux_index or 0)]
        self._asked_s = self._manager.clock.now_s()
        for session in self._sessions:
            self._mover.leave(session, self.bootstrap_room)
        try:
            server = self._rail.meet(self.bootstrap_addr, directory)
        except LocalError as error:
            self._failure = str(error)
            return
        self._by_rail = self._rail.receiver(self._rail.manager, server, self._name)
        self.kv_mgr = _HeldPages(self._rail.manager, self._name)
        self._by_rail.init(self._ranks[0].dp_rank)
        if self._by_rail.conclude_state is None:
            self._by_rail.send_metadata(kv_indices, aux_index, state_indices, decode_prefix_len)
            self.bootstrap_infos = self._by_rail.bootstrap_infos

    def poll(self) -> int:
        if self._by_rail is None or self.conclude_state is not None:
            return super().poll()
        self._failure = next(filter(None, (session.failure for session in self._sessions)), "")
        if self._failure:
            self._by_rail.abort()
        status = int(self._by_rail.poll())
        self.abort_notified = self._by_rail.abort_notified
        if status in (KVPoll.Success, KVPoll.Failed):
            return self._conclude(status)
        return status

    def _conclude(self, status: int) -> int:
        if self._by_rail is None:
            return super()._conclude(status)
        if self.conclude_state is None:
            self.conclude_state = status
            if status == KVPoll.Failed:
                recorded = self._rail.manager.failure_records.get(self._name, "")
                self._failure = self._failure or recorded or "another rank failed"
                # The next request registers anew: prefill sends nothing to a rank that it could not reach once.
                self._by_rail.invalidate_cached_bootstrap_infos()
            self._log("done" if status == KVPoll.Success else "failed")
        return status

    def failure_exception(self) -> None:
        if self._by_rail is None:
            super().failure_exception()
            return
        try:
            self._by_rail.failure_exception()
        except KVTransferError as error:
            if self.conclude_state is None:
                self._failure = "another rank of the decode server failed"
                self._conclude(KVPoll.Failed)
            reason = self._failure or error.failure_reason
            raise TransferFailedError(self.bootstrap_room, reason, error.is_from_another_rank) from None

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:
        """Tell prefill to write no more, and have SGLang keep the pages until it has said that it does not."""
        if self._by_rail is not None:
            self._by_rail.ensure_abort_notified(force_arm=force_arm)
            self.abort_notified = self._by_rail.abort_notified

    def abort(self) -> None:
        if self._by_rail is None:
            super().abort()
        elif self.conclude_state is None:
            self._failure = "the decode leg of the request was aborted"
            self._by_rail.abort()
            self.abort_notified = self._by_rail.abort_notified
            self._conclude(KVPoll.Failed)

    def clear(self) -> None:
        if self._by_rail is not None:
            self._by_rail.clear()
        else:
            super().clear()
        if self._holds_name:
            self._holds_name = False
            self._rail.rooms.give_back(self.bootstrap_room)

    def _log(self, status: str) -> None:
        if self._by_rail is None:
            super()._log(status)
            return
        layout = self._manager.layout
        moved = [n * sum(part.item_bytes) for n, part in zip(self._counts, layout.components, strict=True)]
        done = status == "done"
        self._manager.log_transfer(
            role="decode",
            room=self.bootstrap_room,
            rail=self._rail.kind,
            status=status,
            reason=self._failure,
            peer=self.bootstrap_addr,
            bytes=sum(moved) if done else 0,
            kv_bytes=moved[KV] if done else 0,
            pages=self._counts[KV],
            cached_prefix_tokens=self._cached_prefix_tokens,
            handshake_s=max(0.0, self._up_s - self._created_s),
            wait_s=self._manager.clock.now_s() - self._asked_s,
        )
