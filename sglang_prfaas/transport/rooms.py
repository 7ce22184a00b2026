"""Which requests a prefill rank knows, by bootstrap room: its own, and those that a decode rank spoke of first."""

from __future__ import annotations

from collections import OrderedDict

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.session import OutgoingTransfer

MAX_ABORTED_ROOMS = 4096
"""Rooms remembered that decode ended before prefill's own request came; the oldest is forgotten first."""


class Rooms:
    """A plain value; the mover calls every method under its lock.

    Decode may ask for a room before prefill's own request comes: the transfer then waits in `_early`, at most as many
    of them as sessions may have transfers. It may also end a room early: that is remembered apart, within a bound of
    its own, so that a flood of one cannot push out the other.
    """

    def __init__(self, clock: Clock, waiting_timeout_s: float) -> None:
        self._clock = clock
        self._waiting_timeout_s = waiting_timeout_s
        self._open: dict[int, OutgoingTransfer] = {}
        self._early: dict[int, OutgoingTransfer] = {}
        self._homes: dict[OutgoingTransfer, tuple[SendSession, int]] = {}
        self._aborted: OrderedDict[int, tuple[str, float]] = OrderedDict()

    def open(self, room: int) -> OutgoingTransfer:
        """Prefill's own request has come. Raises LocalError for a room in use."""
        if room in self._open:
            raise LocalError(f"bootstrap room {room} is in use by another request")
        transfer = self._early.pop(room, None) or OutgoingTransfer(room, self._clock)
        aborted = self._aborted.pop(room, None)
        if aborted is not None:
            transfer.fail(aborted[0])
        self._open[room] = transfer
        return transfer

    def home(self, transfer: OutgoingTransfer) -> SendSession | None:
        """The session a transfer goes to, once decode has asked for it."""
        found = self._homes.get(transfer)
        return found[0] if found is not None else None

    def asked_for(self, room: int, session: SendSession, transfer_id: int) -> OutgoingTransfer:
        """A decode rank asks for a room; the first to ask becomes its home. An end remembered for the room is void."""
        self._aborted.pop(room, None)
        transfer = self._open.get(room) or self._early.get(room)
        if transfer is None:
            transfer = self._early[room] = OutgoingTransfer(room, self._clock)
        if transfer not in self._homes:
            self._homes[transfer] = (session, transfer_id)
            session.transfers[transfer_id] = transfer
        return transfer

    def aborted(self, room: int, session: SendSession | None, reason: str) -> OutgoingTransfer | None:
        """Decode ended a room. Returns the transfer to fail; None where there is none, or where it goes to another
        decode rank than the one that speaks: nobody ends the request of others."""
        transfer = self._open.get(room) or self._early.get(room)
        if transfer is None:
            self._remember_end(room, reason)
            return None
        home = self.home(transfer)
        if home is not None and home is not session:
            return None
        if room in self._early:
            self.forget(transfer)
            self._remember_end(room, reason)
        return transfer

    def lost(self, session: SendSession, reason: str) -> list[OutgoingTransfer]:
        """A session has ended. Returns its transfers, to fail them."""
        transfers = list(session.transfers.values())
        for transfer in transfers:
            if self._early.get(transfer.room) is transfer:
                self.forget(transfer)
                self._remember_end(transfer.room, reason)
        return transfers

    def _remember_end(self, room: int, reason: str) -> None:
        self._aborted.pop(room, None)
        self._aborted[room] = (reason, self._clock.now_s())
        if len(self._aborted) > MAX_ABORTED_ROOMS:
            self._aborted.popitem(last=False)

    def forget(self, transfer: OutgoingTransfer) -> SendSession | None:
        """Drop a request. Returns the session it went to."""
        for rooms in (self._open, self._early):
            if rooms.get(transfer.room) is transfer:
                del rooms[transfer.room]
        session, transfer_id = self._homes.pop(transfer, (None, 0))
        if session is not None and session.transfers.get(transfer_id) is transfer:
            del session.transfers[transfer_id]
        return session

    def expire(self) -> list[tuple[OutgoingTransfer, SendSession, int]]:
        """Drop what has waited too long for prefill's own request; returns those a decode rank still waits for."""
        before_s = self._clock.now_s() - self._waiting_timeout_s
        while self._aborted and next(iter(self._aborted.values()))[1] < before_s:
            self._aborted.popitem(last=False)
        late = [(t, *self._homes[t]) for t in self._early.values() if t.created_s < before_s]
        for transfer, _, _ in late:
            self.forget(transfer)
        return late

    def all(self) -> list[OutgoingTransfer]:
        """Every transfer there is."""
        return [*self._open.values(), *self._early.values()]
