"""A request's transfers as one: to the decode ranks that one prefill rank serves, from the prefill ranks that one
decode rank takes from. There is one transfer at either end where both servers have the same attention TP width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from sglang_prfaas.transport.memory import Indices
from sglang_prfaas.transport.messages import Expect
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.paging import PromptPages
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.transfer import State, Transfer

_SLOWEST_FIRST = (
    State.WAITING,
    State.READY,
    State.EXPECTING,
    State.SENDING,
    State.RECEIVING,
    State.DONE,
)


def joint_state(transfers: Iterable[Transfer]) -> State:
    """Failed where one has, else that of the one that is behind all others. Begun where one has, on the decode side."""
    states = {transfer.state for transfer in transfers}
    if State.FAILED in states:
        return State.FAILED
    if State.EXPECTING in states and len(states) > 1:
        return State.RECEIVING
    return next(state for state in _SLOWEST_FIRST if state in states)


def joint_reason(transfers: Iterable[Transfer]) -> str:
    """Why the first of the failed ones has failed; empty where none has."""
    return next((transfer.reason for transfer in transfers if transfer.state is State.FAILED), "")


class FanOut:
    """A request on a prefill rank. Raises LocalError, as `SendMover.transfer` does.

    How many decode ranks there are is known once the first of them has asked; the request waits for all of them."""

    def __init__(self, mover: SendMover, room: int) -> None:
        self._mover = mover
        self._complete = False
        self.transfers = [mover.transfer(room)]

    @property
    def first(self) -> OutgoingTransfer:
        """The transfer to the first of the decode ranks."""
        return self.transfers[0]

    @property
    def expected(self) -> Expect | None:
        """What decode expects; None until all of its ranks have asked."""
        if not self._open_all() or any(transfer.expected is None for transfer in self.transfers):
            return None
        return self.first.expected

    @property
    def prompt_pages(self) -> PromptPages | None:
        """This rank's pages of the request as decode counts them; None until all of its ranks have asked."""
        expected, view = self.expected, self._mover.view(self.first)
        if expected is None or view is None:
            return None
        page_tokens = self._mover.layout.page_tokens
        return PromptPages(
            page_tokens,
            view.layout.page_tokens,
            view.peer_page_tokens or page_tokens,
            expected.cached_prefix_tokens,
            expected.counts,
        )

    @property
    def state(self) -> State:
        """Where the request stands. One failed transfer ends the others."""
        if self.first.live and not self._open_all():
            return State.WAITING
        state = joint_state(self.transfers)
        if state is State.FAILED:
            self.abort(f"another decode rank: {self.reason}")
        return state

    @property
    def live(self) -> bool:
        return self.state not in (State.DONE, State.FAILED)

    @property
    def reason(self) -> str:
        """Why the request has failed."""
        return joint_reason(self.transfers)

    @property
    def admitted(self) -> bool:
        """Whether there is room for all of it on its link; see `OutgoingTransfer.admitted`."""
        let_in = [transfer.admitted for transfer in self.transfers]
        return all(let_in)

    def start(self, kv_items: int) -> None:
        """Prefill knows how many full-attention items it will send. Ends the request where decode's ranks disagree."""
        asked = [transfer.expected for transfer in self.transfers]
        if len({expected.cached_prefix_tokens for expected in asked if expected is not None}) > 1:
            self.abort("the decode ranks have different numbers of tokens of the prompt cached")
        for transfer in self.transfers:
            with transfer.lock:
                transfer.start(kv_items)

    def send(
        self,
        component: int,
        first_item: int,
        indices: Indices,
        ready: Callable[[], None],
        buffers: Sequence[int] | None = None,
    ) -> list[Indices]:
        """`SendMover.send` to all decode ranks."""
        return [
            self._mover.send(transfer, component, first_item, indices, ready, buffers=buffers)
            for transfer in self.transfers
        ]

    def finish(self) -> None:
        for transfer in self.transfers:
            self._mover.finish(transfer)

    def abort(self, reason: str) -> None:
        for transfer in self.transfers:
            self._mover.abort(transfer, reason)

    def release(self) -> None:
        for transfer in self.transfers:
            self._mover.release(transfer)

    def moved(self) -> None:
        """Items queued before have moved to other slots. Under `locked`."""
        for transfer in self.transfers:
            transfer.moves += 1

    def locked(self) -> ExitStack:
        """Keep all mover threads from the request's pages."""
        with ExitStack() as stack:
            for transfer in self.transfers:
                stack.enter_context(transfer.lock)
            return stack.pop_all()

    def late(self, waiting_s: float, transfer_s: float) -> str:
        """Why one of the transfers has taken too long; see `OutgoingTransfer.poll_timeout`."""
        return next(filter(None, (t.poll_timeout(waiting_s, transfer_s) for t in self.transfers)), "")

    @property
    def bytes(self) -> int:
        return sum(transfer.bytes for transfer in self.transfers)

    @property
    def wire_bytes(self) -> int:
        return sum(transfer.wire_bytes for transfer in self.transfers)

    @property
    def resent_chunks(self) -> int:
        return sum(transfer.resent_chunks for transfer in self.transfers)

    @property
    def corrupt_chunks(self) -> int:
        return sum(transfer.corrupt_chunks for transfer in self.transfers)

    @property
    def ready_s(self) -> float:
        return max(transfer.ready_s for transfer in self.transfers)

    @property
    def first_byte_s(self) -> float:
        return min((t.first_byte_s for t in self.transfers if t.first_byte_s), default=0.0)

    @property
    def last_byte_s(self) -> float:
        return max(transfer.last_byte_s for transfer in self.transfers)

    @property
    def progress_s(self) -> float:
        return max(transfer.progress_s for transfer in self.transfers)

    def _open_all(self) -> bool:
        """Have a transfer for every decode rank, once it is known how many there are."""
        if self._complete or self.first.expected is None:
            return self._complete
        view = self._mover.view(self.first)
        for share in range(1, view.shares if view is not None else 1):
            self.transfers.append(self._mover.transfer(self.first.room, share))
        self._complete = True
        return True
