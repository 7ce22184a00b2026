"""The pool: what can be reused, what goes first, and invariants under random use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from sglang_prfaas.errors import ConfigError, PoolFullError
from sglang_prfaas.prefix_cache.groups import Group, PoolLayout
from sglang_prfaas.prefix_cache.ledger import BlockLedger
from sglang_prfaas.prefix_cache.pool import HybridPool, Lease, Ticket, Transfer

MLA = Group(name="mla", kind="full", entry_bytes=100)
KDA = Group(name="kda", kind="linear", entry_bytes=250)
WINDOW = Group(name="window", kind="window", entry_bytes=90)
DENSE = PoolLayout(block_bytes=100, block_tokens=16, groups=(MLA,))
HYBRID = PoolLayout(block_bytes=100, block_tokens=16, groups=(KDA, MLA, WINDOW))  # 1 block of KV, 4 of state


def prompt(*turns: int, blocks: int = 4) -> list[int]:
    """Hashes of a conversation: equal as far as the turns are."""
    return [abs(hash((turns[: at // blocks + 1], at))) for at in range(blocks * len(turns))]


def put(pool: HybridPool, hashes: list[int], *checkpoints: int, cost_s: float = 1.0) -> None:
    ticket = pool.store(hashes, [cost_s] * len(hashes), checkpoints)
    if ticket is not None:
        pool.commit(ticket)


def test_dense_prefix_is_reused_block_by_block() -> None:
    pool = HybridPool(DENSE, 100)
    put(pool, prompt(1, 2))
    assert pool.cached_tokens(prompt(1, 2)) == 8 * 16
    lease = pool.acquire(prompt(1, 3))
    assert lease is not None
    assert (lease.tokens, len(lease.kv), lease.state) == (64, 4, ())
    assert pool.acquire(prompt(9)) is None


def test_state_is_reused_at_exact_checkpoints_only() -> None:
    pool = HybridPool(HYBRID, 100)
    put(pool, prompt(1, 2), 3, 6)
    assert pool.ledger.prefix_blocks == 6 + 2 * 4, "blocks after the last checkpoint are not kept"
    assert pool.cached_tokens(prompt(1, 2)) == 6 * 16
    assert pool.cached_tokens(prompt(1, 3)) == 3 * 16, "four blocks are common, but there is no state after the fourth"
    assert pool.cached_tokens(prompt(1, 2)[:5]) == 3 * 16
    assert pool.cached_tokens(prompt(1, 2)[:2]) == 0
    assert pool.store(prompt(1, 2), [1.0] * 8, [6]) is None
    assert pool.store(prompt(5), [1.0] * 4) is None, "no checkpoint, nothing to reuse later"
    lease = pool.acquire(prompt(1, 2))
    assert lease is not None
    assert {name: len(blocks) for name, blocks in HYBRID.split(lease.state, state=True).items()} == {
        "kda": 3,
        "window": 1,
    }
    assert {name: len(blocks) for name, blocks in HYBRID.split(lease.kv[0], state=False).items()} == {"mla": 1}


def test_nothing_is_reused_before_it_is_written() -> None:
    pool = HybridPool(HYBRID, 100)
    ticket = pool.store(prompt(1), [1.0] * 4, [2, 4])
    assert ticket is not None
    assert (sorted(ticket.kv), sorted(ticket.states)) == ([0, 1, 2, 3], [2, 4])
    assert pool.cached_tokens(prompt(1)) == 0
    assert pool.store(prompt(1), [1.0] * 4, [4]) is None, "someone else is at it"
    pool.abort(ticket)
    assert pool.ledger.free_blocks == 100
    put(pool, prompt(1), 4)
    assert pool.cached_tokens(prompt(1)) == 64


def test_least_recently_used_goes_first_from_its_end() -> None:
    pool = HybridPool(DENSE, 12)
    for turn in (1, 2, 3):
        put(pool, prompt(turn))
    lease = pool.acquire(prompt(1))
    assert lease is not None
    pool.release(lease)
    put(pool, prompt(4)[:3])
    assert [pool.cached_tokens(prompt(turn)) // 16 for turn in (1, 2, 3)] == [4, 1, 4]
    assert pool.evicted_blocks == 3


def test_what_is_dear_to_get_again_stays_longer_but_not_for_ever() -> None:
    pool = HybridPool(DENSE, 12)
    put(pool, prompt(1), cost_s=5.0)
    for turn in range(2, 6):
        put(pool, prompt(turn))
    assert pool.cached_tokens(prompt(1)) == 64
    for turn in range(6, 30):
        put(pool, prompt(turn))
    assert pool.cached_tokens(prompt(1)) == 0


def test_a_checkpoint_goes_with_the_blocks_that_lead_to_it_alone() -> None:
    pool = HybridPool(HYBRID, 20)
    put(pool, prompt(1), 2, 4)
    put(pool, prompt(2), 2)
    assert pool.ledger.free_blocks == 20 - 12 - 6
    put(pool, prompt(3), 2)
    assert [pool.cached_tokens(prompt(turn)) // 16 for turn in (1, 2, 3)] == [2, 2, 2]
    assert pool.ledger.prefix_blocks == 18


def test_a_held_prefix_is_not_evicted() -> None:
    pool = HybridPool(DENSE, 8)
    put(pool, prompt(1))
    lease = pool.acquire(prompt(1))
    assert lease is not None
    with pytest.raises(PoolFullError, match="5 blocks for a prefix: 1 would have to be evicted, 0 can be"):
        pool.store(prompt(2, 3)[:5], [1.0] * 5)
    assert pool.ledger.free_blocks == 4
    pool.release(lease)
    put(pool, prompt(2, 3)[:5])
    assert pool.cached_tokens(prompt(1)) == 48


@pytest.mark.parametrize(("layout", "blocks"), [(DENSE, 4), (HYBRID, 8)])
def test_others_go_before_a_held_prefix_that_is_older(layout: PoolLayout, blocks: int) -> None:
    pool = HybridPool(layout, 3 * blocks)
    put(pool, prompt(1), 4)
    lease = pool.acquire(prompt(1))
    assert lease is not None
    for turn in range(2, 8):
        put(pool, prompt(turn), 4)
    assert [pool.cached_tokens(prompt(turn)) for turn in (1, 5, 6, 7)] == [64, 0, 64, 64]
    pool.release(lease)
    put(pool, prompt(8), 4)
    assert [pool.cached_tokens(prompt(turn)) for turn in (1, 6, 7, 8)] == [64, 0, 64, 64]


def test_transfers_of_any_length() -> None:
    pool = HybridPool(DENSE, 10)
    transfers = [pool.open_transfer(length_bytes) for length_bytes in (1, 100, 150, 201)]
    assert [len(transfer.blocks) for transfer in transfers] == [1, 1, 2, 3]
    for transfer in transfers:
        pool.close_transfer(transfer)
    assert pool.ledger.free_blocks == 10


def test_floors() -> None:
    pool = HybridPool(DENSE, 12, prefix_floor_blocks=4, transfer_floor_blocks=4)
    put(pool, prompt(1, 2))
    put(pool, prompt(3))
    assert pool.evicted_blocks == 4, "four blocks are the transfers'"
    transfer = pool.open_transfer(800)
    assert pool.ledger.prefix_blocks == 4
    with pytest.raises(PoolFullError, match=r"a transfer of 1 blocks: 8 of at most 8 are taken"):
        pool.open_transfer(1)
    pool.close_transfer(transfer)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="floors of 7 blocks for prefixes and 4 for transfers"):
        BlockLedger(10, prefix_floor_blocks=7, transfer_floor_blocks=4)
    with pytest.raises(ConfigError, match="at least one block"):
        BlockLedger(0, prefix_floor_blocks=0, transfer_floor_blocks=0)
    with pytest.raises(ConfigError, match="no full-attention group"):
        PoolLayout(block_bytes=10, block_tokens=1, groups=(KDA,))
    with pytest.raises(ConfigError, match="the same name"):
        PoolLayout(block_bytes=10, block_tokens=1, groups=(MLA, MLA))
    with pytest.raises(ValueError, match="1 costs for 4 blocks"):
        HybridPool(DENSE, 10).store(prompt(1), [1.0])


class PoolMachine(RuleBasedStateMachine):
    """Prompts of a few conversations, leases, tickets and transfers in any order, on a pool that is too small."""

    leases = Bundle("leases")
    tickets = Bundle("tickets")
    transfers = Bundle("transfers")

    @initialize(hybrid=st.booleans(), floors=st.tuples(st.integers(0, 12), st.integers(0, 12)))
    def start(self, hybrid: bool, floors: tuple[int, int]) -> None:
        self.prefix_floor, self.transfer_floor = floors
        self.pool = HybridPool(
            HYBRID if hybrid else DENSE, 30, prefix_floor_blocks=floors[0], transfer_floor_blocks=floors[1]
        )
        self.held: list[Lease] = []
        self.filling: list[Ticket] = []
        self.open: list[Transfer] = []
        self.written: dict[int, object] = {}

    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(lambda turns: prompt(*turns, blocks=3))

    @rule(target=tickets, hashes=prompts, checkpoints=st.sets(st.integers(1, 12)), cost_s=st.floats(0, 10))
    def store(self, hashes: list[int], checkpoints: set[int], cost_s: float) -> Ticket | None:
        before = self.snapshot()
        ledger = self.pool.ledger
        try:
            ticket = self.pool.store(hashes, [cost_s] * len(hashes), checkpoints)
        except PoolFullError:
            assert self.snapshot() == before, "refused, and nothing changed"
            layout = self.pool.layout
            most = len(hashes) * layout.kv_blocks + len(checkpoints) * layout.state_blocks
            assert before[1] + most > self.prefix_floor, "within their floor prefixes are never refused"
            return None
        if ticket is not None:
            self.filling.append(ticket)
        assert ledger.prefix_blocks <= max(before[1], 30 - self.transfer_floor)
        return ticket

    @rule(ticket=consumes(tickets), well=st.booleans())
    def finish(self, ticket: Ticket | None, well: bool) -> None:
        if ticket is not None:
            self.filling.remove(ticket)
            (self.pool.commit if well else self.pool.abort)(ticket)

    @rule(target=leases, hashes=prompts)
    def acquire(self, hashes: list[int]) -> Lease | None:
        tokens = self.pool.cached_tokens(hashes)
        lease = self.pool.acquire(hashes)
        assert (lease.tokens if lease else 0) == tokens
        if lease is not None:
            assert bool(lease.state) == self.pool.layout.hybrid
            self.held.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            self.held.remove(lease)
            self.pool.release(lease)

    @rule(target=transfers, length_bytes=st.integers(0, 1500))
    def open_transfer(self, length_bytes: int) -> Transfer | None:
        before = self.snapshot()
        within_floor = self.pool.ledger.transfer_blocks + -(-length_bytes // 100) <= self.transfer_floor
        try:
            transfer = self.pool.open_transfer(length_bytes)
        except PoolFullError:
            assert self.snapshot() == before
            assert not within_floor
            return None
        assert not within_floor or self.snapshot()[1] == before[1], "within the floor nothing is evicted"
        self.open.append(transfer)
        return transfer

    @rule(transfer=consumes(transfers))
    def close_transfer(self, transfer: Transfer | None) -> None:
        if transfer is not None:
            self.open.remove(transfer)
            self.pool.close_transfer(transfer)

    def snapshot(self) -> tuple[list[int], int, int, int]:
        ledger = self.pool.ledger
        return (sorted(self.pool._tree.nodes), ledger.prefix_blocks, ledger.transfer_blocks, ledger.free_blocks)

    @invariant()
    def every_block_has_one_owner(self) -> None:
        ledger, nodes = self.pool.ledger, self.pool._tree.nodes.values()
        prefix = [block for node in nodes for block in (*node.kv, *node.state)]
        transfer = [block for transfer in self.open for block in transfer.blocks]
        assert sorted(prefix + transfer + ledger._free) == list(range(30))
        assert (len(prefix), len(transfer)) == (ledger.prefix_blocks, ledger.transfer_blocks)
        assert ledger.transfer_blocks <= 30 - self.prefix_floor
        assert ledger.prefix_blocks <= 30 - self.transfer_floor

    @invariant()
    def prefixes_are_whole_and_of_use(self) -> None:
        tree = self.pool._tree
        children: dict[int, int] = {}
        for node in tree.nodes.values():
            assert node.parent is tree.root or (node.parent and tree.nodes[node.parent.key] is node.parent)
            children[node.parent.key] = children.get(node.parent.key, 0) + 1
        evictable = 0
        for node in tree.nodes.values():
            assert node.children == children.get(node.key, 0)
            assert not node.state_ready or node.state
            if self.pool.layout.hybrid and not (node.children or node.locks):
                assert node.state, "a block that leads to no checkpoint"
            evictable += len(node.kv) * (node.locks == 0) + len(node.state) * (node.state_locks == 0)
        assert evictable == tree.evictable_blocks

    @invariant()
    def what_is_held_stays(self) -> None:
        nodes = self.pool._tree.nodes
        for lease in self.held:
            assert nodes[lease.node.key] is lease.node
            assert lease.node.state == lease.state
        for ticket in self.filling:
            assert all(nodes[node.key] is node for node in ticket.added)

    def teardown(self) -> None:
        """All of it can be had again."""
        if not hasattr(self, "pool"):
            return
        for lease in self.held:
            self.pool.release(lease)
        for ticket in self.filling:
            self.pool.abort(ticket)
        for transfer in self.open:
            self.pool.close_transfer(transfer)
        self.pool.open_transfer(100 * (30 - self.prefix_floor))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
