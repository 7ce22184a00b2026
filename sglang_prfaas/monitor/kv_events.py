"""SGLang's KV-event messages as changes of the global index: a pure function over bytes.

A message is MessagePack: `[ts, events, dp_rank]`, each event a map with `type` BlockStored, BlockRemoved or
AllBlocksCleared (SGLang 0.5.23, disaggregation/kv_events.py). Token ids are skipped unread: block hashes are enough.
SGLang reports blocks of full attention only. Recurrent and window state it does not report, so this project adds two
types that a server's plugin may send, `StateStored` and `StateRemoved`, with the same fields; where none come, the
end of every stored run of blocks can be taken for a checkpoint (`infer_states`), which is where SGLang leaves one.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.prefix_cache.changes import Change, Cleared, Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier

MAX_MESSAGE_BYTES = 256 << 20
"""A larger message is refused unread; one with 1,000,000 tokens has about 5 MB."""

_TIERS: dict[str | None, int] = {None: 0, "GPU": 0, "CPU_PINNED": 1, "DISK": 2, "EXTERNAL": 2}
"""Places in `_RUNS` of KV; its state is `_STATE` further."""
_RUNS = [(tier, part) for part in Part for tier in Tier]
_STATE = len(Tier)

_Hashes = list[Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]]
"""SGLang writes signed 64-bit integers."""


class BlockStored(Struct, tag=True, gc=False):
    block_hashes: _Hashes
    block_size: int
    medium: str | None = None


class BlockRemoved(Struct, tag=True, gc=False):
    block_hashes: _Hashes
    medium: str | None = None


class AllBlocksCleared(Struct, tag=True, gc=False):
    pass


class StateStored(Struct, tag=True, gc=False):
    block_hashes: _Hashes
    medium: str | None = None


class StateRemoved(Struct, tag=True, gc=False):
    block_hashes: _Hashes
    medium: str | None = None


_Event = BlockStored | BlockRemoved | AllBlocksCleared | StateStored | StateRemoved


class _Message(Struct, array_like=True):
    ts: float
    events: list[_Event]
    dp_rank: int | None = None


class _LooseMessage(Struct, array_like=True):
    """For messages with types of events that this version does not know."""

    ts: float
    events: list[msgspec.Raw]
    dp_rank: int | None = None


class _Tagged(Struct):
    type: str


_KNOWN = {kind.__name__ for kind in (BlockStored, BlockRemoved, AllBlocksCleared, StateStored, StateRemoved)}
_decoder = msgspec.msgpack.Decoder(_Message)
_loose_decoder = msgspec.msgpack.Decoder(_LooseMessage)
_tag_decoder = msgspec.msgpack.Decoder(_Tagged)
_event_decoder = msgspec.msgpack.Decoder(_Event)


class KvEventReader:
    """Messages of one publisher in, changes out, those of several messages joined: what costs most is the fixed part of
    a change, and a server in decode reports one block at a time.

    `block_tokens`: blocks of another size cannot match a prompt, and are skipped; 0: the size is the largest of the
    first message that stores any. `skipped` counts events that say nothing usable: those, and unknown types and tiers.
    """

    def __init__(self, block_tokens: int = 0, *, infer_states: bool = False) -> None:
        self.block_tokens = block_tokens
        self.skipped = 0
        self._infer_states = infer_states
        self._changes: list[Change] = []
        self._storing = True
        self._runs: list[list[int]] = [[] for _ in _RUNS]

    def feed(self, payload: bytes | memoryview) -> None:
        """Read a message. Raises ProtocolError for anything that is none, and then takes nothing of it."""
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"KV events: a message of {len(payload)} bytes, at most {MAX_MESSAGE_BYTES} are accepted"
            )
        try:
            try:
                events = _decoder.decode(payload).events
            except msgspec.ValidationError:
                message = _loose_decoder.decode(payload)
                known = [raw for raw in message.events if _tag_decoder.decode(raw).type in _KNOWN]
                events = [_event_decoder.decode(raw) for raw in known]
                self.skipped += len(message.events) - len(known)
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"KV events: a message that is none of SGLang's: {error}") from None
        if not self.block_tokens:
            self.block_tokens = max((e.block_size for e in events if isinstance(e, BlockStored)), default=0)
        self._add(events)

    def take(self) -> tuple[Change, ...]:
        """The changes since the last call, in order; neighbours that add, or that remove, are joined, since among them
        the order says nothing."""
        self._end_run(storing=True)
        changes, self._changes = tuple(self._changes), []
        return changes

    def _add(self, events: list[_Event]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._end_run(storing=True)
                self._changes = [Cleared()]
                continue
            kind, hashes = type(event), event.block_hashes
            place = _TIERS.get(event.medium)
            if place is None or not hashes:
                self.skipped += 1
                continue
            if isinstance(event, BlockStored) and event.block_size != self.block_tokens:
                self.skipped += 1
                continue
            storing = kind is BlockStored or kind is StateStored
            if storing is not self._storing:
                self._end_run(storing)
            if kind is StateStored or kind is StateRemoved:
                place += _STATE
            self._runs[place] += hashes
            if self._infer_states and kind is BlockStored:
                self._runs[place + _STATE].append(hashes[-1])

    def _end_run(self, storing: bool) -> None:
        kind = Stored if self._storing else Removed
        for number, hashes in enumerate(self._runs):
            if hashes:
                self._changes.append(kind(np.array(hashes, np.int64).view(np.uint64), *_RUNS[number]))
                self._runs[number] = []
        self._storing = storing
