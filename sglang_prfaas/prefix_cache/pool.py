"""The hybrid prefix cache pool of one host: who has which block, what can be reused, what goes first. No bytes.

Prefix-cache blocks are whole blocks of tokens, kept as a tree. Full attention reuses any prefix of it. A hybrid model
also needs the recurrent (or window) state at exactly the prefix's end, so it reuses only prefixes that end at a
checkpoint, and blocks that lead to no checkpoint are not kept. Transfer-cache blocks hold a prefill's tail on its way
out, and are free once the transfer ends. Source: PrfaaS section 3.2.

Eviction is LRU with costs, GreedyDual-Size (Cao and Irani 1997): an entry's value is its cost in seconds for each pool
block it frees, plus the value of what was evicted last at the time of its last use. Only leaves (and, in a hybrid
model, checkpoints) are candidates, so what remains are always whole prefixes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from msgspec import Struct

from sglang_prfaas.errors import PoolFullError
from sglang_prfaas.prefix_cache.groups import PoolLayout
from sglang_prfaas.prefix_cache.ledger import BlockLedger, Blocks
from sglang_prfaas.prefix_cache.tree import Node, PrefixTree


class Lease(Struct, eq=False):
    """A cached prefix that stays as long as it is held. `kv`: pool blocks of each block of tokens, `state`: those of
    the checkpoint at its end (hybrid models); `PoolLayout.split` tells the groups apart."""

    tokens: int
    kv: tuple[Blocks, ...]
    state: Blocks
    node: Node


class Ticket(Struct, eq=False):
    """Pool blocks to be written before `commit` makes them a cached prefix, by number of the block of tokens."""

    kv: dict[int, Blocks]
    states: dict[int, Blocks]  # the state after so many blocks of tokens
    tip: Node
    added: list[Node]
    with_state: list[Node]


class Transfer(Struct, eq=False):
    """Pool blocks of a transfer under way."""

    blocks: Blocks


class HybridPool:
    """Blocks shared by all groups of a layout, prefixes and transfers. Not safe for several threads.

    A request for more than can be freed raises PoolFullError and changes nothing. Transfers always get
    `transfer_floor_blocks`, and prefixes `prefix_floor_blocks`, whatever the other side does.
    """

    def __init__(
        self, layout: PoolLayout, total_blocks: int, *, prefix_floor_blocks: int = 0, transfer_floor_blocks: int = 0
    ) -> None:
        self.layout = layout
        self.ledger = BlockLedger(
            total_blocks, prefix_floor_blocks=prefix_floor_blocks, transfer_floor_blocks=transfer_floor_blocks
        )
        self.evicted_blocks = 0
        self._tree = PrefixTree()
        self._order: list[tuple[float, int, int, Node]] = []  # heap of (value, use, serial, node)
        self._inflation = 0.0
        self._serials = 0
        self._uses = 0

    # --- prefixes ---------------------------------------------------------------------------------------------------

    def cached_tokens(self, hashes: Sequence[int]) -> int:
        """Tokens of the prompt with these block hashes that could be reused. Does not count as a use."""
        return len(self._usable(hashes)) * self.layout.block_tokens

    def acquire(self, hashes: Sequence[int]) -> Lease | None:
        """Hold the longest reusable prefix of a prompt until `release`; None if there is none."""
        path = self._usable(hashes)
        if not path:
            return None
        node = path[-1]
        self._hold(node)
        if self.layout.hybrid:
            self._tree.lock_state(node)
            node.serial = 0
        return Lease(len(path) * self.layout.block_tokens, tuple(at.kv for at in path), node.state, node)

    def hold(self, key: int) -> Lease | None:
        """Hold the prefix that ends with the block of tokens of this hash, and the checkpoint at its end where there is
        one, until `release`; None if it is not there. `Lease.kv` is of that block alone."""
        node = self._tree.nodes.get(key)
        if node is None or not node.ready:
            return None
        self._hold(node)
        state = node.state if node.state_ready else ()
        if state:
            self._tree.lock_state(node)
            node.serial = 0
        return Lease(self.layout.block_tokens, (node.kv,), state, node)

    def release(self, lease: Lease) -> None:
        """End a lease. The prefix counts as used now."""
        if lease.state:
            self._tree.unlock_state(lease.node)
        self._tree.unlock(lease.node)
        self._use(lease.node)
        self._settle(lease.node)

    def blocks_of(self, key: int) -> tuple[Blocks, Blocks]:
        """Pool blocks of the block of tokens with this hash, and of the checkpoint at its end; empty what is not
        reusable. They stay its own until the pool is changed: read them before, or hold the prefix with `acquire`."""
        node = self._tree.nodes.get(key)
        if node is None or not node.ready:
            return (), ()
        return node.kv, node.state if node.state_ready else ()

    def touch(self, key: int) -> None:
        """Count a use of the prefix that ends with this hash, if it is there."""
        node = self._tree.nodes.get(key)
        if node is not None and node.ready:
            self._use(node)
            self._settle(node)

    def store(
        self, hashes: Sequence[int], block_costs_s: Sequence[float], checkpoints: Iterable[int] = ()
    ) -> Ticket | None:
        """Make room for a prompt's blocks that are not cached yet.

        `block_costs_s`: for each block, the seconds it would take to get it again, by computing or by fetching,
        whichever is less. `checkpoints`: after how many blocks the state is at hand; a hybrid model's blocks after the
        last one are left out. Where another ticket is filling the same blocks, this one ends before them. None: there
        is nothing to add. Raises PoolFullError.
        """
        if len(block_costs_s) != len(hashes):
            raise ValueError(f"{len(block_costs_s)} costs for {len(hashes)} blocks")
        path = self._tree.walk(hashes)
        length = len(path) if len(path) < len(hashes) and hashes[len(path)] in self._tree.nodes else len(hashes)
        marks: list[int] = []
        if self.layout.hybrid:
            marks = sorted({mark for mark in checkpoints if 0 < mark <= length})
            length = marks[-1] if marks else 0
            marks = [mark for mark in marks if mark > len(path) or not path[mark - 1].state]
        fresh = range(len(path), length)
        if not fresh and not marks:
            return None

        base = path[min(len(path), length) - 1] if path and length else self._tree.root
        self._hold(base)
        try:
            needed = len(fresh) * self.layout.kv_blocks + len(marks) * self.layout.state_blocks
            self._evict(self.ledger.to_evict_for_prefix(needed), f"{needed} blocks for a prefix")
        except PoolFullError:
            self._tree.unlock(base)
            self._settle(base)
            raise
        ticket = Ticket({}, {}, base, [], [])
        for index in fresh:
            kv = self.ledger.take_prefix(self.layout.kv_blocks)
            ticket.tip = self._tree.add(hashes[index], ticket.tip, kv, block_costs_s[index])
            ticket.kv[index] = kv
            ticket.added.append(ticket.tip)
        self._tree.lock(ticket.tip)
        self._tree.unlock(base)
        nodes = path + ticket.added
        for mark in marks:
            self._reserve_state(ticket, nodes, mark)
        return ticket

    def commit(self, ticket: Ticket) -> None:
        """All the ticket's blocks are written: they can be reused from now on."""
        for node in ticket.added:
            node.ready = True
        for node in ticket.with_state:
            node.state_ready = True
            self._tree.unlock_state(node)
        self._tree.unlock(ticket.tip)
        for node in [*ticket.with_state, ticket.tip]:
            self._use(node)
            self._settle(node)

    def abort(self, ticket: Ticket) -> None:
        """The ticket's blocks will not be written: they are free again."""
        for node in ticket.with_state:
            self._tree.unlock_state(node)
            self.ledger.give_back_prefix(self._tree.drop_state(node))
        self._tree.unlock(ticket.tip)
        base = ticket.added[0].parent if ticket.added else ticket.tip
        for node in reversed(ticket.added):
            self.ledger.give_back_prefix(self._tree.remove(node))
        if base is not None:
            self._settle(base)

    # --- transfers --------------------------------------------------------------------------------------------------

    def open_transfer(self, length_bytes: int) -> Transfer:
        """Blocks for bytes on their way out; any length. Evicts prefixes down to their floor. Raises PoolFullError."""
        return Transfer(self._take_for_transfer(self.layout.blocks_for_bytes(length_bytes)))

    def close_transfer(self, transfer: Transfer) -> None:
        """The transfer has ended, well or not: its blocks are free."""
        self.ledger.give_back_transfer(transfer.blocks)
        transfer.blocks = ()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _hold(self, node: Node) -> None:
        self._tree.lock(node)
        if not self.layout.hybrid:
            node.serial = 0

    def _use(self, node: Node) -> None:
        """Count a use of a prefix: of all its blocks, or in a hybrid model of its checkpoint."""
        self._uses += 1
        at: Node | None = node
        while at is not None:
            at.used_at, at.use = self._inflation, self._uses
            at = None if self.layout.hybrid else at.parent

    def _usable(self, hashes: Sequence[int]) -> list[Node]:
        path = self._tree.walk(hashes)
        while self.layout.hybrid and path and not path[-1].state_ready:
            path.pop()
        return path

    def _reserve_state(self, ticket: Ticket, nodes: list[Node], mark: int) -> None:
        node = nodes[mark - 1]
        node.run_blocks, node.run_cost_s = 1, node.cost_s
        for before in reversed(nodes[: mark - 1]):
            if before.state:
                break
            node.run_blocks += 1
            node.run_cost_s += before.cost_s
        self._tree.set_state(node, self.ledger.take_prefix(self.layout.state_blocks))
        self._tree.lock_state(node)
        ticket.states[mark] = node.state
        ticket.with_state.append(node)

    def _take_for_transfer(self, blocks: int) -> Blocks:
        self._evict(self.ledger.to_evict_for_transfer(blocks), f"{blocks} blocks for a transfer")
        return self.ledger.take_transfer(blocks)

    def _evict(self, blocks: int, purpose: str) -> None:
        """Free at least so many prefix blocks, or raise PoolFullError before any is freed."""
        if blocks > self._tree.evictable_blocks:
            raise PoolFullError(
                f"{purpose}: {blocks} would have to be evicted, {self._tree.evictable_blocks} can be "
                f"({self.ledger.free_blocks} of {self.ledger.total_blocks} are free)"
            )
        goal = self.ledger.prefix_blocks - blocks
        while self.ledger.prefix_blocks > goal:
            value, _, serial, node = heapq.heappop(self._order)
            if serial != node.serial:
                continue
            self._inflation = max(self._inflation, value)
            before = self.ledger.prefix_blocks
            if self.layout.hybrid:
                self.ledger.give_back_prefix(self._tree.drop_state(node))
                self._trim(node)
            else:
                self._remove_leaf(node)
            self.evicted_blocks += before - self.ledger.prefix_blocks

    def _trim(self, node: Node) -> None:
        """Free the blocks that lead to no checkpoint any more."""
        while node.parent is not None and not (node.children or node.locks or node.state):
            self.ledger.give_back_prefix(self._tree.remove(node))
            node = node.parent
        self._rank(node)

    def _remove_leaf(self, node: Node) -> None:
        parent = node.parent
        self.ledger.give_back_prefix(self._tree.remove(node))
        if parent is not None:
            self._rank(parent)

    def _settle(self, node: Node) -> None:
        """After a change of locks: give the node its place in the order of eviction, or free what is of no use."""
        if self.layout.hybrid:
            self._trim(node)
        else:
            self._rank(node)

    def _rank(self, node: Node) -> None:
        """Put a candidate where it belongs in the order of eviction; anything else leaves it."""
        if self.layout.hybrid:
            candidate = bool(node.state) and node.state_ready and not node.state_locks
            freed = self.layout.state_blocks + (0 if node.children else node.run_blocks * self.layout.kv_blocks)
            cost_s = node.run_cost_s
        else:
            candidate = node.parent is not None and not (node.children or node.locks)
            freed, cost_s = self.layout.kv_blocks, node.cost_s
        node.serial = 0
        if not candidate:
            return
        self._serials += 1
        node.serial = self._serials
        heapq.heappush(self._order, (node.used_at + cost_s / freed, node.use, self._serials, node))
        if len(self._order) > 64 + 4 * len(self._tree.nodes):
            self._order = [entry for entry in self._order if entry[2] == entry[3].serial]
            heapq.heapify(self._order)
