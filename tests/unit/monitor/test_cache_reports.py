"""Changes of caches as messages, and a router's place in an agent's log."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.monitor import wire
from sglang_prfaas.monitor.cache_reports import CacheChange, CacheReader, CacheUpdate, ReadCache, pack, unpack
from sglang_prfaas.prefix_cache.change_log import HolderChange, Read
from sglang_prfaas.prefix_cache.changes import Cleared, Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier
from sglang_prfaas.prefix_cache.matching import Holder

HASHES = np.array([1, 2**64 - 1, 77], np.uint64)


def answer(asked: ReadCache, *, position: int = 5, more: bool = False, restarted: bool = False) -> CacheUpdate:
    return CacheUpdate(
        site="a", epoch=9, asked=asked, position=position, cursor=-1, restarted=restarted, more=more, changes=[]
    )


def test_changes_come_back_as_they_were() -> None:
    holder = Holder("a", "p0", 1)
    changes = [
        HolderChange(holder, Stored(HASHES, Tier.HOST, Part.STATE), 64),
        HolderChange(holder, Removed(HASHES, Tier.DISK), 64),
        HolderChange(holder, Cleared(), 0),
    ]
    update = wire.decode_report(wire.encode(pack("a", 3, ReadCache(), Read(changes, 8, 4, True, True))))
    assert isinstance(update, CacheUpdate)
    assert (update.position, update.cursor, update.restarted, update.more) == (8, 4, True, True)
    back = [unpack("a", change) for change in update.changes]
    for one, other in zip(changes, back, strict=True):
        assert (one.holder, one.block_tokens, type(one.change)) == (
            other.holder,
            other.block_tokens,
            type(other.change),
        )
        if not isinstance(one.change, Cleared) and not isinstance(other.change, Cleared):
            assert one.change.hashes.tolist() == other.change.hashes.tolist()
            assert (one.change.tier, one.change.part) == (other.change.tier, other.change.part)


@pytest.mark.parametrize(
    "change",
    [CacheChange("p", 0, 1, 7), CacheChange("p", 0, 1, 0, hashes=b"123"), CacheChange("p", 0, 1, 0, tier=9)],
)
def test_what_is_no_change_is_refused(change: CacheChange) -> None:
    with pytest.raises(ProtocolError, match="cache of a"):
        unpack("a", change)


def test_a_lost_answer_is_asked_for_again_and_an_old_one_dropped() -> None:
    clock = VirtualClock()
    reader = CacheReader(clock, interval_s=1.0, timeout_s=2.0)
    first = reader.due()
    assert first == ReadCache()
    assert reader.due() is None
    clock.advance(2.0)
    assert reader.due() == first
    assert reader.accept(answer(first, more=True))
    assert not reader.accept(answer(first))  # the answer that seemed lost
    second = reader.due()
    assert second == ReadCache(epoch=9, position=5, cursor=-1)
    assert not reader.accept(answer(msgspec.structs.replace(second, epoch=8)))
    assert reader.accept(answer(second, restarted=True))
    assert reader.restarts == 1
    assert reader.due() is None  # nothing new: not before the interval is over
    clock.advance(1.0)
    assert reader.due() is not None
