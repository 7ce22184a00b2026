"""SGLang's KV-event messages as changes of the global index: a pure function over bytes.

A message is MessagePack: `[ts, events, dp_rank]`, each event a map with `type` BlockStored, BlockRemoved or
AllBlocksCleared (SGLang 0.5.23, disaggregation/kv_events.py). Token ids are skipped unread: block hashes are enough.
SGLang reports blocks of full attention only. Recurrent and window state it does not report, so this project adds two
types that a server's plugin may send, `StateStored` and `StateRemoved`, with the same fields; where none come, the
end of every stored run of blocks can be taken for a checkpoint (`infer_states`), which is where SGLang leaves one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.prefix_cache.block_hash import BlockHashes
from sglang_prfaas.prefix_cache.changes import Change, Cleared, Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier

MAX_MESSAGE_BYTES = 256 << 20
"""A larger message is refused unread; one with 1,000,000 tokens has about 5 MB."""

_TIERS = {None: Tier.DEVICE, "GPU": Tier.DEVICE, "CPU_PINNED": Tier.HOST, "DISK": Tier.DISK, "EXTERNAL": Tier.DISK}


class BlockStored(Struct, tag=True, gc=False):
    block_hashes: list[int]
    block_size: int
    medium: str | None = None


class BlockRemoved(Struct, tag=True, gc=False):
    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(Struct, tag=True, gc=False):
    pass


class StateStored(Struct, tag=True, gc=False):
    block_hashes: list[int]
    medium: str | None = None


class StateRemoved(Struct, tag=True, gc=False):
    block_hashes: list[int]
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


class KvEvents(Struct, frozen=True, eq=False):
    """One decoded message. `ts_s` is the server's wall clock; `skipped` counts events that say nothing usable."""

    ts_s: float
    changes: tuple[Change, ...]
    dp_rank: int | None = None
    skipped: int = 0
    block_tokens: int = 0


def decode_kv_events(payload: bytes | memoryview, block_tokens: int, *, infer_states: bool = False) -> KvEvents:
    """The changes that a message reports, in order; neighbours of one kind are joined.

    Blocks of another size than `block_tokens` cannot match a prompt, and are skipped, as are unknown types of events
    and tiers. With 0 the size is the largest of this message's; the answer names it, 0 while none is known. Raises
    ProtocolError for anything that is no such message.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"KV events: a message of {len(payload)} bytes, at most {MAX_MESSAGE_BYTES} are accepted")
    try:
        message: _Message | _LooseMessage
        try:
            message = _decoder.decode(payload)
            events, unknown = message.events, 0
        except msgspec.ValidationError:
            message = _loose_decoder.decode(payload)
            known = [raw for raw in message.events if _tag_decoder.decode(raw).type in _KNOWN]
            events, unknown = [_event_decoder.decode(raw) for raw in known], len(message.events) - len(known)
        block_tokens = block_tokens or max((e.block_size for e in events if isinstance(e, BlockStored)), default=0)
        changes, skipped = _changes(events, block_tokens, infer_states)
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"KV events: a message that is none of SGLang's: {error}") from None
    return KvEvents(message.ts, changes, message.dp_rank, skipped + unknown, block_tokens)


def _changes(events: Iterable[_Event], block_tokens: int, infer_states: bool) -> tuple[tuple[Change, ...], int]:
    changes: list[Change] = []
    skipped = 0
    for (kind, medium), group in itertools.groupby(events, _kind_and_medium):
        if kind is AllBlocksCleared:
            changes.append(Cleared())
            continue
        same = list(group)
        tier = _TIERS.get(medium)
        usable = [] if tier is None else [event for event in same if _fits(event, block_tokens)]
        skipped += len(same) - len(usable)
        if tier is None or not usable:
            continue
        hashes = _hashes(itertools.chain.from_iterable(_hashes_of(event) for event in usable))
        part = Part.STATE if kind in (StateStored, StateRemoved) else Part.KV
        changes.append((Stored if kind in (BlockStored, StateStored) else Removed)(hashes, tier, part))
        if infer_states and kind is BlockStored:
            changes.append(Stored(_hashes(_hashes_of(event)[-1] for event in usable), tier, Part.STATE))
    return tuple(changes), skipped


def _kind_and_medium(event: _Event) -> tuple[type[_Event], str | None]:
    return type(event), None if isinstance(event, AllBlocksCleared) else event.medium


def _fits(event: _Event, block_tokens: int) -> bool:
    if isinstance(event, BlockStored) and event.block_size != block_tokens:
        return False
    return bool(_hashes_of(event))


def _hashes_of(event: _Event) -> list[int]:
    return [] if isinstance(event, AllBlocksCleared) else event.block_hashes


def _hashes(values: Iterable[int]) -> BlockHashes:
    """SGLang writes signed 64-bit integers."""
    return np.fromiter(values, np.int64).view(np.uint64)
