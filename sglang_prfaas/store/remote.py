"""Prefixes that only another site holds: asked for when a prompt comes in, fetched while the server computes others.

SGLang asks which prefix exists, then reads it, each on a thread of its own; the request is scheduled when it has been
read. So `extend` asks the peers, decides, and begins to fetch; `read` waits for what is on its way. States come before
pages: without them the rest is of no use. What has come is kept in the tier behind, whether the fetch ended well or
not: the next attempt needs less.

A fetch ends at the latest when computing would have been done too, so a wrong decision costs at most as much again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from sglang_prfaas.clock import Clock, Deadline
from sglang_prfaas.errors import ChecksumError, PrfaasError
from sglang_prfaas.store.fetch_choice import PeerEstimate, PrefillTime, choose, compute_s
from sglang_prfaas.store.fetch_plan import Groups, Object, groups_of, joined, ordered, parts, wanted
from sglang_prfaas.store.hits import Hit, Need, best_hit
from sglang_prfaas.store.identity import object_name
from sglang_prfaas.store.objects import head_bytes, is_intact
from sglang_prfaas.store.staging import OpenRoom, Room, on_the_heap
from sglang_prfaas.store.stats import Counters, PeerStats

logger = logging.getLogger(__name__)

MAX_FETCHES = 4
"""Under way at a time."""
MAX_ASKED = 16384
"""Names of one question."""
LEAST_ASK_S = 0.1
"""Time for a question, even where computing takes less."""


class Peer(Protocol):
    """A site that can be asked. Raises PrfaasError where it does not answer in time, or wrongly."""

    site: str

    def ask(self, groups: Groups, deadline: Deadline) -> Sequence[int]: ...

    def get(
        self, groups: Groups, sizes: Sequence[int], take: Callable[[str, bytearray], None], deadline: Deadline
    ) -> bool: ...

    def close(self) -> None: ...


class FetchLimits(Struct, frozen=True, kw_only=True):
    """margin: see `choose`. timeout_s: of a question and of a fetch at most. max_bytes: of all fetches under way.
    least_tokens: hits below are not used by SGLang."""

    margin: float
    timeout_s: float
    max_bytes: int
    least_tokens: int


class _Fetch:
    def __init__(self, total_bytes: int, room: Room) -> None:
        self.total_bytes = total_bytes
        self.arrived_bytes = 0
        self.room = room
        self.ended = False


class RemoteTier:
    """The peers of one rank. Safe for several threads."""

    def __init__(
        self,
        peers: Sequence[tuple[Peer, PeerEstimate]],
        prefill: PrefillTime,
        limits: FetchLimits,
        *,
        namespaces: Mapping[str, str],
        payload_bytes: Mapping[str, int],
        page_tokens: int,
        keep: Callable[[str, memoryview], bool],
        counters: Counters,
        clock: Clock,
        open_room: OpenRoom = on_the_heap,
    ) -> None:
        """payload_bytes: of one object of each component. keep: the tier behind. open_room: where objects wait until
        they are read and kept."""
        self._peers = list(peers)
        self._prefill = prefill
        self._limits = limits
        self._namespaces = namespaces
        self._payload_bytes = payload_bytes
        self._page_tokens = page_tokens
        self._keep = keep
        self._counters = counters
        self._clock = clock
        self._open_room = open_room
        self._changed = threading.Condition()
        self._flights: dict[str, _Fetch] = {}
        self._fetches: dict[_Fetch, tuple[Peer, threading.Thread]] = {}
        self._closed = False

    # --- what the tiers ask -------------------------------------------------------------------------------------------

    def coming(self, component: str, key: str) -> bool:
        """Whether the object is on its way."""
        with self._changed:
            return object_name(self._namespaces[component], key) in self._flights

    def read(self, component: str, key: str, out: memoryview) -> bool:
        """Wait for an object on its way and copy it. False: it is not, did not come, or has another length."""
        name = object_name(self._namespaces[component], key)
        with self._changed:
            fetch = self._flights.get(name)
            if fetch is None:
                return False
            self._changed.wait_for(lambda: fetch.room.size(name) >= 0 or fetch.ended)
            if fetch.room.size(name) != len(out):
                return False
            fetch.room.copy(name, out)
            return True

    def extend(
        self,
        keys: Sequence[str],
        needs: Sequence[Need],
        local: Hit,
        contains: Callable[[str, str], bool],
        prefix_pages: int,
    ) -> Hit:
        """The hit with what a peer is now fetched from; `local` where there is nothing, or computing is quicker.

        prefix_pages: pages before `keys`, which the server has. contains: what the own tiers hold."""
        before = (prefix_pages + local.pages) * self._page_tokens
        most_s = compute_s(self._prefill, before, (prefix_pages + len(keys)) * self._page_tokens)
        if local.pages == len(keys) or len(keys) * self._page_tokens < self._limits.least_tokens:
            return local
        asked = wanted(keys, needs, local, contains)[:MAX_ASKED]
        for peer, estimate in self._peers:
            with self._changed:
                rests, rtt_s = estimate.rests(self._clock.now_s()), estimate.rtt_s
            if rests:
                continue
            if not choose(rtt_s, most_s, self._limits.margin).fetch:
                self._counters.add(fetch_refused=1)
                continue
            sizes = self._ask(peer, estimate, asked, min(self._limits.timeout_s, max(LEAST_ASK_S, most_s)))
            there = {item: size for item, size in sizes.items() if size == self._frame_bytes(item)}
            hit = best_hit(keys, needs, lambda c, k: (c, k) in there or contains(c, k))  # noqa: B023
            if hit.pages <= local.pages or hit.pages * self._page_tokens < self._limits.least_tokens:
                continue
            items = [item for item in parts(keys, needs, hit.pages) if item in there and not contains(*item)]
            after = (prefix_pages + hit.pages) * self._page_tokens
            if self._begin(peer, estimate, items, there, before, after):
                return joined(local, hit, needs)
        return local

    def peers(self) -> tuple[PeerStats, ...]:
        with self._changed:
            now_s = self._clock.now_s()
            return tuple(
                PeerStats(site=peer.site, bytes_per_s=estimate.bytes_per_s(now_s), rtt_s=estimate.rtt_s)
                for peer, estimate in self._peers
            )

    def close(self) -> None:
        """End what is under way."""
        with self._changed:
            self._closed = True
            threads = [thread for _, thread in self._fetches.values()]
        for peer, _ in self._peers:
            peer.close()
        for thread in threads:
            thread.join()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _frame_bytes(self, item: Object) -> int:
        component, key = item
        name = object_name(self._namespaces[component], key)
        return head_bytes(name) + self._payload_bytes[component]

    def _ask(self, peer: Peer, estimate: PeerEstimate, items: Sequence[Object], timeout_s: float) -> dict[Object, int]:
        """Lengths of the frames that the peer has; none where it does not answer."""
        self._counters.add(fetch_questions=1)
        began_s = self._clock.now_s()
        try:
            sizes = peer.ask(self._groups(items), Deadline(self._clock, timeout_s))
        except PrfaasError as error:
            self._failed(peer, estimate, f"question to site {peer.site}: {error}")
            return {}
        with self._changed:
            estimate.answered(self._clock.now_s() - began_s)
        return dict(zip(items, sizes, strict=True))

    def _begin(
        self,
        peer: Peer,
        estimate: PeerEstimate,
        items: Sequence[Object],
        sizes: Mapping[Object, int],
        before: int,
        after: int,
    ) -> bool:
        """Decide, and start to fetch."""
        total = sum(sizes[item] for item in items)
        with self._changed:
            if self._closed:
                return False
            under_way = [fetch.total_bytes - fetch.arrived_bytes for fetch in self._fetches]
            held = sum(fetch.total_bytes for fetch in self._fetches)
            outstanding = sum(
                fetch.total_bytes - fetch.arrived_bytes for fetch, (of, _) in self._fetches.items() if of is peer
            )
            fetch_s = estimate.fetch_s(total, outstanding, self._clock.now_s())
            choice = choose(fetch_s, compute_s(self._prefill, before, after), self._limits.margin)
            if not choice.fetch:
                self._counters.add(fetch_refused=1)
                logger.debug("prfaas: %d tokens of site %s are computed: %s", after - before, peer.site, choice)
                return False
            room = None
            if len(under_way) < MAX_FETCHES and held + total <= self._limits.max_bytes:
                room = self._open_room([self._payload_bytes[component] for component, _ in items])
            if room is None:
                self._counters.add(fetch_full=1)
                return False
            fetch = _Fetch(total, room)
            deadline = Deadline(self._clock, min(self._limits.timeout_s, choice.compute_s))
            thread = threading.Thread(
                target=self._run,
                args=(peer, estimate, fetch, items, sizes, deadline, after - before),
                name=f"prfaas-fetch-{peer.site}",
                daemon=True,
            )
            self._fetches[fetch] = peer, thread
            for component, key in items:
                self._flights[object_name(self._namespaces[component], key)] = fetch
            thread.start()
        self._counters.add(fetches=1)
        logger.info("prfaas: fetch of %d tokens (%d bytes) from site %s: %s", after - before, total, peer.site, choice)
        return True

    def _run(
        self,
        peer: Peer,
        estimate: PeerEstimate,
        fetch: _Fetch,
        items: Sequence[Object],
        sizes: Mapping[Object, int],
        deadline: Deadline,
        tokens: int,
    ) -> None:
        def take(name: str, frame: bytearray) -> None:
            head, view = head_bytes(name), memoryview(frame)
            if not is_intact(name, view[:head], view[head:]):
                self._counters.add(corrupt_objects=1)
                raise ChecksumError(f"{name} came corrupt")
            with self._changed:
                fetch.room.put(name, view[head:])
                fetch.arrived_bytes += len(frame)
                self._changed.notify_all()
            self._counters.add(fetched_objects=1, fetched_bytes=len(frame))

        began_s = self._clock.now_s()
        whole = False
        try:
            groups = self._groups(items)
            whole = peer.get(groups, [sizes[item] for item in ordered(items)], take, deadline)
            if not whole:
                self._counters.add(fetch_failed=1)
                logger.warning("prfaas: site %s has dropped a part of what was fetched; it is computed", peer.site)
        except PrfaasError as error:
            if not self._closed:
                text = f"fetch from site {peer.site} ended after {fetch.arrived_bytes} of {fetch.total_bytes} bytes"
                self._failed(peer, estimate, f"{text}: {error}; what is missing is computed")
        finally:
            took_s = self._clock.now_s() - began_s
            with self._changed:
                fetch.ended = True
                estimate.moved(fetch.arrived_bytes, took_s, self._clock.now_s())
                self._changed.notify_all()
            self._settle(fetch)
            if whole:
                self._counters.add(fetched_tokens=tokens, fetch_saved_s=deadline.budget_s - took_s)

    def _settle(self, fetch: _Fetch) -> None:
        """Keep what came in the tier behind, and only then forget it."""
        try:
            for name in fetch.room.names():
                self._keep(name, fetch.room.whole(name))
        finally:
            with self._changed:
                fetch.room.close()
                self._flights = {name: other for name, other in self._flights.items() if other is not fetch}
                del self._fetches[fetch]

    def _failed(self, peer: Peer, estimate: PeerEstimate, text: str) -> None:
        self._counters.add(fetch_failed=1)
        with self._changed:
            estimate.failed(self._clock.now_s())
        logger.warning("prfaas: %s", text)

    def _groups(self, items: Sequence[Object]) -> Groups:
        return groups_of(items, self._namespaces)
