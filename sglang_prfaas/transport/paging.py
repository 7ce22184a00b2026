"""Servers of different page sizes: pages are cut into units that the pages of both ends are made of.

Pure. A page is the rows of its tokens, one after the other, so a page of 64 tokens is four units of 16, and the
session of a prefill rank with pages of 64 and a decode rank with pages of 16 has items of 16 tokens. The unit is the
greatest common divisor of both sizes. Decode asks for whole pages of its own; where prefill has no page for a unit at
their ends (it is after the prompt, or before the window), any other goes: nobody reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import structs

from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.memory import Indices

TOKEN_ROWS = ("", "nhd", "NHD")
"""Byte layouts of pages that are one row for each token."""
WINDOWS = ("swa",)
"""Components whose items are pages of the prompt's last tokens."""
PAGED = ("kv", *WINDOWS)
"""Components whose items are such pages."""
NOT_PAGED = ("mamba", "aux")
"""Components whose items have nothing to do with pages."""
MAX_PAGE_TOKENS = 1 << 16
"""Of pages that are cut into units. A peer says what its size is, and prefill fills up decode's last page."""


def unit_of(one: int, other: int) -> int:
    """Tokens of a unit, of two page sizes."""
    return math.gcd(one, other)


def obstacle(layout: Layout, unit_tokens: int) -> str:
    """Why the pages of `layout` cannot be cut into units of so many tokens; an empty string where they can."""
    if layout.page_tokens == unit_tokens:
        return ""
    if layout.page_tokens < 1 or unit_tokens < 1 or layout.page_tokens % unit_tokens:
        return f"pages of {layout.page_tokens} tokens are no multiple of {unit_tokens}"
    if layout.page_tokens > MAX_PAGE_TOKENS:
        return f"pages have more than {MAX_PAGE_TOKENS} tokens"
    if layout.kv_format not in TOKEN_ROWS:
        return f"pages of byte layout {layout.kv_format} are not one row for each token"
    for component in layout.components:
        if component.name not in (*PAGED, *NOT_PAGED):
            return f"how {component.name} is divided among pages is not known"
        if component.name in PAGED and any(size % layout.page_tokens for size in component.item_bytes):
            return f"pages of {component.name} are not one row for each token"
    return ""


def repaged(layout: Layout, unit_tokens: int) -> Layout:
    """The layout with pages of `unit_tokens`. Only without `obstacle`."""
    splits = units_of_items(layout, unit_tokens)
    components = tuple(
        component if parts == 1 else _cut(component, parts)
        for component, parts in zip(layout.components, splits, strict=True)
    )
    return structs.replace(layout, page_tokens=unit_tokens, components=components)


def _cut(component: Component, parts: int) -> Component:
    shardings = tuple(
        structs.replace(sharding, rows=sharding.rows // parts) if sharding.sections else sharding
        for sharding in component.shardings
    )
    return structs.replace(
        component, item_bytes=tuple(size // parts for size in component.item_bytes), shardings=shardings
    )


def units_of_items(layout: Layout, unit_tokens: int) -> tuple[int, ...]:
    """Of each component: how many units an item is; 1 where it is no page."""
    parts = layout.page_tokens // unit_tokens
    return tuple(parts if component.name in PAGED else 1 for component in layout.components)


def cut(pages: Indices, parts: int) -> Indices:
    """Slots of the units that pages consist of: unit j of slot p is at slot p * parts + j."""
    if parts == 1:
        return pages
    units: Indices = (pages[:, None] * parts + np.arange(parts, dtype=np.int64)).reshape(-1)
    return units


class PromptPages:
    """A request's pages on the prefill side, in units as decode counts them: unit 0 is the first that decode expects.

    page_tokens, unit_tokens: of a page here, and of a unit; peer_page_tokens: of a page of decode. prefix_tokens: which
    decode has. expected: units that decode expects, of each component."""

    def __init__(
        self, page_tokens: int, unit_tokens: int, peer_page_tokens: int, prefix_tokens: int, expected: Sequence[int]
    ) -> None:
        self._page_tokens, self.unit_tokens, self._peer_page_tokens = page_tokens, unit_tokens, peer_page_tokens
        self._parts = page_tokens // unit_tokens
        self._prefix_tokens = prefix_tokens
        self._expected = tuple(expected)
        self.first_token = prefix_tokens - prefix_tokens % page_tokens
        """Of the first page that is handed over: one that decode has a part of is handed over too."""
        self._skipped = (prefix_tokens - self.first_token) // unit_tokens

    def agreed(self, pages: int) -> int:
        """Units of full attention to begin the transfer with, where so many pages will be handed over: those that
        decode expects, unless the prompt has another length there."""
        units = pages * self._parts - self._skipped
        more = (self._expected[0] - units) * self.unit_tokens
        fits = units > 0 and -self._page_tokens < more < self._peer_page_tokens
        return self._expected[0] if fits else max(units, 0)

    def units(self, first_page: int, pages: Indices, *, last: bool = False) -> tuple[int, Indices]:
        """First unit and slots of the units of some pages, the first of them page `first_page` of those handed over.
        last: no more will come, so that all that decode expects from there on is filled up."""
        if self._page_tokens == self._peer_page_tokens:
            return first_page, pages
        slots = cut(pages, self._parts)
        first = first_page * self._parts - self._skipped
        slots, first = slots[max(0, -first) :], max(0, first)
        slots = slots[: max(0, self._expected[0] - first)]
        missing = self._expected[0] - first - len(slots)
        if last and len(slots) and 0 < missing * self.unit_tokens < self._peer_page_tokens:
            slots = np.concatenate([slots, np.repeat(slots[-1:], missing)])
        return first, slots

    def window(self, component: int, pages: Indices, handed_over: int) -> Indices:
        """Slots of the units that decode expects of a component of the last pages of the prompt, of which `pages` are
        here; `handed_over`: full-attention pages. Raises LocalError where they are others."""
        if self._page_tokens == self._peer_page_tokens:
            return pages
        count = self._expected[component]
        if not count and not len(pages):
            return pages
        slots = cut(pages, self._parts)
        ours_stop = self.first_token + handed_over * self._page_tokens
        theirs_stop = self._prefix_tokens + self._expected[0] * self.unit_tokens
        ours_first = ours_stop // self.unit_tokens - len(slots)
        theirs_first = theirs_stop // self.unit_tokens - count
        before = (ours_first - theirs_first) * self.unit_tokens
        if not count or not len(slots) or before >= self._peer_page_tokens or -before >= self._page_tokens:
            raise LocalError(
                f"prefill has {len(pages)} pages of {self._page_tokens} tokens of component {component}, "
                f"decode reserved {count * self.unit_tokens} tokens"
            )
        wanted: Indices = slots[np.clip(np.arange(count) + theirs_first - ours_first, 0, len(slots) - 1)]
        return wanted
