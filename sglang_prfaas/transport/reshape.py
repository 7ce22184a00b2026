"""Servers of different attention TP widths: which bytes of an item go from which prefill rank to which decode rank.

Pure. Both ends compute the same answer from the sharding that both have, the two widths and the two ranks:

    1:2   a prefill rank serves several decode ranks, a part of every item to each
    2:1   a decode rank takes from several prefill ranks, a part of every item from each

One of the widths divides the other. What several prefill ranks hold alike (the latent of MLA, a KV head that more ranks
have than there are heads) is sent by one of them, in turn over the buffers, so that all links carry their share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec import structs

from sglang_prfaas.transport.layout import Component, Layout, Sharding, differences
from sglang_prfaas.transport.paging import obstacle, repaged, unit_of

AUX = "aux"
"""The component of metadata buffers, the same on every rank of a server. Every prefill rank that a decode rank takes
from sends all of it, so that no transfer is without a byte."""

MAX_PARTS = 1 << 16
"""Separate byte ranges of one item; more of them are refused."""

MAX_WIDTH_RATIO = 64
"""How many times as wide as the other a server may be: so many transfers, or sessions, a request takes at one rank."""


class ItemPart(NamedTuple):
    """Some bytes of an item: the ranges `parts` (start, stop) of each of its `rows` rows of `row_bytes`."""

    rows: int
    row_bytes: int
    parts: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self.rows * sum(stop - start for start, stop in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the item."""
        return self.bytes == self.rows * self.row_bytes


class Move(NamedTuple):
    """What of a buffer's items moves from a prefill rank to a decode rank: as many bytes, in the same order."""

    source: ItemPart
    target: ItemPart


def width_problem(prefill_width: int, decode_width: int) -> str:
    """Why servers of these widths cannot work together, whatever they hold; an empty string where they can."""
    widths = f"attention TP width: prefill has {prefill_width}, decode has {decode_width}"
    low, high = sorted((prefill_width, decode_width))
    if low < 1 or high % low:
        return f"{widths}; one must be a multiple of the other"
    if high // low > MAX_WIDTH_RATIO:
        return f"{widths}; one may be at most {MAX_WIDTH_RATIO} times the other"
    return ""


def peers(prefill_width: int, decode_width: int, decode_rank: int) -> range:
    """The prefill ranks that a decode rank takes from. Only without `width_problem`."""
    if prefill_width <= decode_width:
        rank = decode_rank * prefill_width // decode_width
        return range(rank, rank + 1)
    share = prefill_width // decode_width
    return range(decode_rank * share, (decode_rank + 1) * share)


def share_of(prefill_width: int, decode_width: int, decode_rank: int) -> tuple[int, int]:
    """Which of how many decode ranks it is that one prefill rank serves for a request."""
    shares = max(1, decode_width // prefill_width)
    return decode_rank % shares, shares


def held(units: int, width: int, rank: int) -> range:
    """The units of a section that a rank holds: an equal part, or one unit that several ranks have where there are more
    ranks than units. Either must divide the other."""
    if units >= width:
        part = units // width
        return range(rank * part, (rank + 1) * part)
    unit = rank * units // width
    return range(unit, unit + 1)


def move(sharding: Sharding, whole_bytes: int, turn: int, prefill: tuple[int, int], decode: tuple[int, int]) -> Move:
    """What moves of an item from prefill (width, rank) to decode (width, rank). `whole_bytes`: of an item that is the
    same on all ranks. `turn`: whose turn it is among prefill ranks that hold the same."""
    senders = peers(prefill[0], decode[0], decode[1])
    if not sharding.sections:
        sent = ((0, whole_bytes),) if senders[turn % len(senders)] == prefill[1] else ()
        return Move(ItemPart(1, whole_bytes, sent), ItemPart(1, whole_bytes, sent))
    source, target = [], []
    source_at = target_at = 0
    for units in sharding.sections:
        ours, theirs = held(units, *prefill), held(units, *decode)
        low, high = max(ours.start, theirs.start), min(ours.stop, theirs.stop)
        if low < high:
            alike = [rank for rank in senders if low in held(units, prefill[0], rank)]
            if alike[turn % len(alike)] == prefill[1]:
                source.append(_bytes(source_at + low - ours.start, high - low, sharding.unit_bytes))
                target.append(_bytes(target_at + low - theirs.start, high - low, sharding.unit_bytes))
        source_at += len(ours)
        target_at += len(theirs)
    return Move(
        ItemPart(sharding.rows, source_at * sharding.unit_bytes, tuple(source)),
        ItemPart(sharding.rows, target_at * sharding.unit_bytes, tuple(target)),
    )


def _bytes(first_unit: int, units: int, unit_bytes: int) -> tuple[int, int]:
    return first_unit * unit_bytes, (first_unit + units) * unit_bytes


def moves(ours: Layout, prefill: tuple[int, int], decode: tuple[int, int]) -> list[list[Move]]:
    """`moves[c][b]` for every buffer. `ours`: the layout of either of the two ranks, without `problems`."""
    return [
        [
            _whole(component.item_bytes[buffer])
            if component.name == AUX
            else move(sharding, component.item_bytes[buffer], buffer, prefill, decode)
            for buffer, sharding in enumerate(_by_buffer(component))
        ]
        for component in ours.components
    ]


def _whole(nbytes: int) -> Move:
    part = ItemPart(1, nbytes, ((0, nbytes),))
    return Move(part, part)


def between(ours: Layout, prefill: tuple[int, int], decode: tuple[int, int]) -> Layout:
    """The layout of what moves between two ranks, as their session uses it."""
    components = tuple(
        Component(component.name, tuple(moved.source.bytes for moved in buffers))
        for component, buffers in zip(ours.components, moves(ours, prefill, decode), strict=True)
    )
    return structs.replace(ours, components=components)


def _by_buffer(component: Component) -> Iterator[Sharding]:
    for sharding in component.shardings:
        for _ in range(sharding.buffers):
            yield sharding


def problems(prefill: Layout, decode: Layout) -> list[str]:
    """Why two ranks cannot exchange KVCache, whatever their widths and page sizes. Empty where they can."""
    if prefill.page_tokens != decode.page_tokens:
        unit_tokens = unit_of(prefill.page_tokens, decode.page_tokens)
        for end, layout in (("prefill", prefill), ("decode", decode)):
            why = obstacle(layout, unit_tokens)
            if why:
                return [
                    f"page size in tokens: prefill has {prefill.page_tokens}, decode has {decode.page_tokens}; {end}: "
                    f"{why}, so give both servers the same --page-size"
                ]
        prefill, decode = repaged(prefill, unit_tokens), repaged(decode, unit_tokens)
    if prefill.tp_size == decode.tp_size:
        return differences(prefill, decode)
    widths = f"attention TP width: prefill has {prefill.tp_size}, decode has {decode.tp_size}"
    problem = width_problem(prefill.tp_size, decode.tp_size)
    if problem:
        return [problem]
    if not 0 <= decode.tp_rank < decode.tp_size:
        return [f"{widths}; decode says that it is rank {decode.tp_rank}"]
    if prefill.tp_rank not in peers(prefill.tp_size, decode.tp_size, decode.tp_rank):
        return [f"{widths}; rank {decode.tp_rank} of decode takes nothing from rank {prefill.tp_rank} of prefill"]
    alike = _without_widths(prefill), _without_widths(decode)
    found = differences(*alike)
    if found:
        return [widths, *found]
    for ours, theirs in zip(prefill.components, decode.components, strict=True):
        problem = _problem(ours, theirs, prefill.tp_size, decode.tp_size)
        if problem:
            return [f"{widths}; {problem}"]
    return []


def can_be_divided(layout: Layout, other_width: int) -> bool:
    """Whether a rank of `layout` can work with a server of another width, as far as it can tell alone."""
    widths = layout.tp_size, other_width
    return not width_problem(*widths) and not any(_unknown(component, widths) for component in layout.components)


def _without_widths(layout: Layout) -> Layout:
    """The layout with all item sizes that depend on the width taken out."""
    components = tuple(Component(component.name, (0,) * len(component.item_bytes)) for component in layout.components)
    return structs.replace(layout, tp_size=1, tp_rank=0, components=components)


def _problem(ours: Component, theirs: Component, prefill_width: int, decode_width: int) -> str:
    unknown = _unknown(ours, (prefill_width, decode_width))
    if unknown:
        return unknown
    if ours.shardings != theirs.shardings:
        return f"{ours.name} is divided among ranks in another way at the other end, so use the same width at both ends"
    for buffer, sharding in enumerate(_by_buffer(ours)):
        for width, item_bytes in ((prefill_width, ours.item_bytes), (decode_width, theirs.item_bytes)):
            expected = _rank_bytes(sharding, width) if sharding.sections else ours.item_bytes[buffer]
            if item_bytes[buffer] != expected:
                return (
                    f"{ours.name} buffer {buffer} has items of {item_bytes[buffer]} bytes at width {width}, expected "
                    f"{expected}"
                )
    return ""


def _unknown(component: Component, widths: tuple[int, int]) -> str:
    """Why a component cannot be divided among these numbers of ranks; an empty string where it can."""
    name = component.name
    if sum(sharding.buffers for sharding in component.shardings) != len(component.item_bytes):
        return f"how {name} is divided among ranks is not known, so use the same width at both ends"
    for sharding in component.shardings:
        if sharding.rows * len(sharding.sections) > MAX_PARTS:
            return f"an item of {name} has more than {MAX_PARTS} parts"
        for width in widths:
            if any(units < 1 or max(units, width) % min(units, width) for units in sharding.sections):
                return f"{name} has {sharding.sections} heads or channels, which cannot be divided among {width} ranks"
    return ""


def _rank_bytes(sharding: Sharding, width: int) -> int:
    return sharding.rows * sum(len(held(units, width, 0)) for units in sharding.sections) * sharding.unit_bytes
