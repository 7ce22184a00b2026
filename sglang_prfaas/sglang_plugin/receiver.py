"""The decode side of one request, in SGLang's terms."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import BaseKVReceiver, KVPoll, KVTransferDestination

from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ConfigError, LocalError, PeerGoneError
from sglang_prfaas.sglang_plugin.kv_pages import KV, component_indices
from sglang_prfaas.sglang_plugin.manager import PrfaasKVManager
from sglang_prfaas.sglang_plugin.ranks import find_ranks, split_address
from sglang_prfaas.sglang_plugin.sender import TransferFailedError
from sglang_prfaas.transport.fan_out import joint_reason, joint_state
from sglang_prfaas.transport.messages import Directory, RankInfo
from sglang_prfaas.transport.part_memory import PrefillRank
from sglang_prfaas.transport.receive_mover import Incoming, PeerSession
from sglang_prfaas.transport.transfer import State

LOOKUP_INTERVAL_S = 0.02

_POLL = {
    State.EXPECTING: KVPoll.Transferring,
    State.RECEIVING: KVPoll.Transferring,
    State.DONE: KVPoll.Success,
    State.FAILED: KVPoll.Failed,
}


class PrfaasKVReceiver(BaseKVReceiver):
    """Finds the prefill ranks, tells them what to send, and knows when all of it has arrived."""

    def __init__(self, mgr: PrfaasKVManager, bootstrap_addr: str, bootstrap_room: int | None = None):
        assert mgr.receive_mover is not None, "a receiver needs a decode manager"
        self.kv_mgr: Any = mgr
        self._manager = mgr
        self.bootstrap_addr = bootstrap_addr
        self.bootstrap_room = bootstrap_room or 0
        self.conclude_state: int | None = None
        self.require_staging = False
        self.abort_notified = False
        self.bootstrap_infos: list[Any] = []
        self._mover = mgr.receive_mover
        self._directory: Directory | None = None
        self._ranks: list[RankInfo] = []
        self._sessions: list[PeerSession] = []
        self._items: list[Incoming] = []
        self._dp_rank: int | None = None
        self._failure = ""
        self._created_s = mgr.clock.now_s()
        self._up_s = 0.0
        self._next_lookup_s = 0.0
        self._cached_prefix_tokens = 0
        self._pages = 0

    def init(self, prefill_dp_rank: int) -> None:
        """Begin to look for the prefill ranks. Never waits: `poll` goes on with it."""
        self._dp_rank = prefill_dp_rank
        self._advance()

    def _advance(self) -> None:
        """Take the handshake one step further: directory, ranks, sessions."""
        if self._sessions or self._failure or self._dp_rank is None:
            return
        now_s = self._manager.clock.now_s()
        if now_s < self._next_lookup_s:
            return
        self._next_lookup_s = now_s + LOOKUP_INTERVAL_S
        try:
            host, port = split_address(self.bootstrap_addr)
        except ConfigError as error:
            self._failure = str(error)
            return
        directory = self._mover.directory(host, port)
        if directory is None:
            self._failure = self._mover.directory_problem(host, port)
            if self._failure:
                return
            limit_s = self._manager.config.handshake_timeout_s
            if now_s - self._created_s > limit_s:
                self._failure = (
                    f"no complete prefill server at bootstrap address {self.bootstrap_addr} within {limit_s:g} s; "
                    "is it up, is it in the prefill role, and does it use the prfaas transfer backend?"
                )
            return
        layout = self._manager.layout
        ranks = find_ranks(directory, self.bootstrap_room, self._dp_rank, layout.tp_rank, layout.tp_size)
        if isinstance(ranks, str):
            self._failure = ranks
            self._mover.forget(host, port)
            return
        self._directory, self._ranks = directory, ranks
        self._sessions = [
            self._mover.session(
                authority(host, port),
                rank.host or host,
                rank.control_port,
                room=self.bootstrap_room,
                rank=PrefillRank(directory.tp_size, rank.tp_rank, directory.page_tokens),
            )
            for rank in ranks
        ]

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: KVTransferDestination = KVTransferDestination.DEVICE,
    ) -> None:
        """Pages are reserved: tell prefill what to send."""
        if not self._sessions or self._failure:
            self._failure = self._failure or "the prefill session was lost before pages were reserved"
            return
        self._cached_prefix_tokens = decode_prefix_len or 0
        try:
            indices = component_indices(kv_indices, state_indices, aux_index or 0)
            self._pages = len(indices[KV])
            for session in self._sessions:
                self._items.append(
                    self._mover.expect(session, self.bootstrap_room, indices, self._cached_prefix_tokens)
                )
        except (LocalError, PeerGoneError) as error:
            self._failure = str(error)

    def poll(self) -> int:
        if self.conclude_state is not None:
            return self.conclude_state
        if self._failure:
            return self._conclude(KVPoll.Failed)
        if self._items:
            return self._poll_transfers()
        self._advance()
        self._failure = self._failure or next(filter(None, (session.failure for session in self._sessions)), "")
        if self._failure:
            return self._conclude(KVPoll.Failed)
        if not self._sessions or not all(session.up for session in self._sessions):
            return KVPoll.Bootstrapping
        self._up_s = self._up_s or self._manager.clock.now_s()
        return KVPoll.WaitingForInput

    def _poll_transfers(self) -> int:
        config = self._manager.config
        transfers = [item.transfer for item in self._items]
        for item in self._items:
            late = item.transfer.poll_timeout(config.waiting_timeout_s, config.transfer_timeout_s)
            if late:
                self._mover.abort(item, late)
        status = _POLL[joint_state(transfers)]
        if status in (KVPoll.Success, KVPoll.Failed):
            self._failure = joint_reason(transfers)
            return self._conclude(status)
        return status

    def _conclude(self, status: int) -> int:
        if self.conclude_state is None:
            self.conclude_state = status
            if status == KVPoll.Failed:
                for item in self._items:
                    self._mover.abort(item, f"another prefill rank: {self._failure}")
                for session in self._sessions[len(self._items) :]:
                    self._mover.abort_room(session, self.bootstrap_room, self._failure or "aborted")
            self._log("done" if status == KVPoll.Success else "failed")
        return self.conclude_state

    def failure_exception(self) -> None:
        """Raise the reason. Fences this rank's pages first where it was another rank that failed."""
        if self.conclude_state == KVPoll.Failed:
            raise TransferFailedError(self.bootstrap_room, self._failure or "aborted")
        self.clear()
        self.conclude_state = KVPoll.Failed
        raise TransferFailedError(self.bootstrap_room, "another rank of the decode server failed", True)

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:
        """Nothing to wait for: once a transfer has ended, this process writes none of its bytes."""

    def abort(self, reason: str = "the decode leg of the request was aborted") -> None:
        """End the request: prefill is told, and from here on no page of it is written."""
        if self.conclude_state is not None:
            return
        self._failure = self._failure or reason
        for item in self._items:
            self._mover.abort(item, self._failure)
        self._conclude(KVPoll.Failed)

    def clear(self) -> None:
        """Forget the request; late chunks of it are dropped."""
        for item in self._items:
            self._mover.release(item)
        for session in self._sessions:
            self._mover.leave(session, self.bootstrap_room)

    def _log(self, status: str) -> None:
        transfers = [item.transfer for item in self._items]
        begun = [transfer for transfer in transfers if transfer.first_byte_s]
        first_byte_s = min((transfer.first_byte_s for transfer in begun), default=0.0)
        last_byte_s = max((transfer.last_byte_s for transfer in begun), default=0.0)
        self._manager.log_transfer(
            role="decode",
            room=self.bootstrap_room,
            status=status,
            reason=self._failure,
            peer=self.bootstrap_addr,
            bytes=sum(transfer.bytes for transfer in transfers),
            wire_bytes=sum(transfer.wire_bytes for transfer in transfers),
            kv_bytes=sum(transfer.kv_bytes for transfer in transfers),
            codec=transfers[0].codec if transfers else "raw",
            pages=self._pages,
            cached_prefix_tokens=self._cached_prefix_tokens,
            resent_chunks=sum(transfer.resent_chunks for transfer in transfers),
            corrupt_chunks=sum(transfer.corrupt_chunks for transfer in transfers),
            handshake_s=max(0.0, self._up_s - self._created_s),
            wait_s=max(0.0, first_byte_s - transfers[0].created_s) if transfers else 0.0,
            transfer_s=last_byte_s - first_byte_s,
        )
