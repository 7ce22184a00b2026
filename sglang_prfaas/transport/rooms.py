"""Which requests a prefill rank knows, by bootstrap room: its own, and those that a decode rank spoke of first."""

from __future__ import annotations

from collections import OrderedDict

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.send_session import SendSession

MAX_ABORTED = 4096
"""Ends remembered that came before prefill's own request; those of the oldest room are forgotten first."""

MAX_ROOM_TRANSFERS = 256
"""Requests that may share a room."""


_Place = tuple[int, int]
"""A room, and which of the decode ranks that the prefill rank serves."""


class Rooms:
    """A plain value; `SendTable` calls every method under its lock.

    SGLang gives the samples of one prompt (`n` above 1) one room, so a room may hold several transfers at once. Their
    prompts are the same, so any of prefill's may go to any of decode's: they are paired in the order they come.

    Where decode is wider than prefill, a request has a transfer for each of the decode ranks that this prefill rank
    serves: its shares. Each share is paired on its own.

    Decode may ask for a room before prefill's own request comes: the transfer then waits in `_early`, at most as many
    of them as sessions may have transfers. It may also end a request early: that is remembered apart, within a bound
    of its own, so that a flood of one cannot push out the other.
    """

    def __init__(self, clock: Clock, waiting_timeout_s: float) -> None:
        self._clock = clock
        self._waiting_timeout_s = waiting_timeout_s
        self._open: dict[_Place, list[OutgoingTransfer]] = {}
        self._early: dict[_Place, list[OutgoingTransfer]] = {}
        self._homes: dict[OutgoingTransfer, tuple[SendSession, int]] = {}
        self._aborted: OrderedDict[_Place, tuple[list[str], float]] = OrderedDict()
        self._aborted_count = 0

    def open(self, room: int, share: int = 0) -> OutgoingTransfer:
        """Prefill's own request has come. Raises LocalError where too many share the room."""
        place = room, share
        held = self._open.get(place, [])
        if len(held) >= MAX_ROOM_TRANSFERS:
            raise LocalError(f"bootstrap room {room} is in use by {len(held)} requests, no more are allowed")
        early = self._early.get(place)
        if early:
            transfer = early.pop(0)
            if not early:
                del self._early[place]
        else:
            transfer = OutgoingTransfer(room, self._clock, share)
            self._fail_if_aborted(transfer)
        self._open.setdefault(place, []).append(transfer)
        return transfer

    def home(self, transfer: OutgoingTransfer) -> SendSession | None:
        """The session a transfer goes to, once decode has asked for it."""
        found = self._homes.get(transfer)
        return found[0] if found is not None else None

    def asked_for(self, room: int, session: SendSession, transfer_id: int) -> OutgoingTransfer:
        """A decode rank asks for a room: it gets the first of prefill's requests that goes to nobody yet."""
        place = room, session.view.share
        transfer = next((t for t in self._open.get(place, ()) if t not in self._homes), None)
        if transfer is None:
            transfer = OutgoingTransfer(room, self._clock, session.view.share)
            self._early.setdefault(place, []).append(transfer)
        self._homes[transfer] = (session, transfer_id)
        session.transfers[transfer_id] = transfer
        return transfer

    def aborted(self, room: int, session: SendSession | None, transfer_id: int, reason: str) -> OutgoingTransfer | None:
        """Decode ended a request: the one of `transfer_id`, or for 0 one that nobody has asked for yet. Returns the
        transfer to fail; None where there is none, or where it is another's: nobody ends the request of others."""
        if transfer_id:
            transfer = session.transfers.get(transfer_id) if session is not None else None
            if transfer is None or transfer.room != room:
                return None
            if transfer in self._early.get(_place(transfer), ()):
                self.forget(transfer)
                self._remember_end(_place(transfer), reason)
            return transfer
        place = room, session.view.share if session is not None else 0
        waiting = (t for t in self._open.get(place, ()) if t not in self._homes and t.live)
        transfer = next(waiting, None)
        if transfer is None:
            self._remember_end(place, reason)
        return transfer

    def lost(self, session: SendSession, reason: str) -> list[OutgoingTransfer]:
        """A session has ended. Returns its transfers, to fail them."""
        transfers = list(session.transfers.values())
        for transfer in transfers:
            if transfer in self._early.get(_place(transfer), ()):
                self.forget(transfer)
                self._remember_end(_place(transfer), reason)
        return transfers

    def _fail_if_aborted(self, transfer: OutgoingTransfer) -> None:
        remembered = self._aborted.get(_place(transfer))
        if remembered is None:
            return
        transfer.fail(remembered[0].pop(0))
        self._aborted_count -= 1
        if not remembered[0]:
            del self._aborted[_place(transfer)]

    def _remember_end(self, place: _Place, reason: str) -> None:
        reasons, _ = self._aborted.pop(place, ([], 0.0))
        if len(reasons) < MAX_ROOM_TRANSFERS:
            reasons.append(reason)
            self._aborted_count += 1
        self._aborted[place] = (reasons, self._clock.now_s())
        if self._aborted_count > MAX_ABORTED:
            self._forget_oldest_end()

    def _forget_oldest_end(self) -> None:
        _, (reasons, _) = self._aborted.popitem(last=False)
        self._aborted_count -= len(reasons)

    def forget(self, transfer: OutgoingTransfer) -> SendSession | None:
        """Drop a request. Returns the session it went to."""
        for rooms in (self._open, self._early):
            held = rooms.get(_place(transfer), [])
            if transfer in held:
                held.remove(transfer)
                if not held:
                    del rooms[_place(transfer)]
        session, transfer_id = self._homes.pop(transfer, (None, 0))
        if session is not None and session.transfers.get(transfer_id) is transfer:
            del session.transfers[transfer_id]
        return session

    def expire(self) -> list[tuple[OutgoingTransfer, SendSession, int]]:
        """Drop what has waited too long for prefill's own request; returns those a decode rank still waits for."""
        before_s = self._clock.now_s() - self._waiting_timeout_s
        while self._aborted and next(iter(self._aborted.values()))[1] < before_s:
            self._forget_oldest_end()
        late = [(t, *self._homes[t]) for held in self._early.values() for t in held if t.created_s < before_s]
        for transfer, _, _ in late:
            self.forget(transfer)
        return late

    def all(self) -> list[OutgoingTransfer]:
        """Every transfer there is."""
        return [t for rooms in (self._open, self._early) for held in rooms.values() for t in held]


def _place(transfer: OutgoingTransfer) -> _Place:
    return transfer.room, transfer.share
