"""The prefixes of a pool as a tree of blocks, with locks on what is in use. No policy: that is in `pool.py`."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_prfaas.prefix_cache.ledger import Blocks


class Node:
    """One block of tokens after a certain prefix. Its hash stands for all of that prefix, so it names the node."""

    __slots__ = (
        "children",
        "cost_s",
        "key",
        "kv",
        "locks",
        "parent",
        "ready",
        "run_blocks",
        "run_cost_s",
        "serial",
        "state",
        "state_locks",
        "state_ready",
        "use",
        "used_at",
    )

    def __init__(self, key: int, parent: Node | None, kv: Blocks, cost_s: float) -> None:
        self.key = key
        self.parent = parent  # None: the root
        self.children = 0
        self.kv = kv
        self.cost_s = cost_s  # to compute or fetch this block again
        self.locks = 0  # leases and tickets on this node or below it
        self.ready = False  # its bytes are written
        self.state: Blocks = ()
        self.state_locks = 0
        self.state_ready = False
        self.run_blocks = 0  # of the checkpoint here: blocks since the one before it, and their cost
        self.run_cost_s = 0.0
        self.serial = 0  # of its entry in the order of eviction, 0: none
        self.used_at = 0.0  # value of what was evicted last when this was used last
        self.use = 0  # number of that use


class PrefixTree:
    """Nodes by hash, and how many pool blocks nobody has locked."""

    def __init__(self) -> None:
        self.root = Node(0, None, (), 0.0)
        self.root.ready = True
        self.nodes: dict[int, Node] = {}
        self.evictable_blocks = 0

    def walk(self, keys: Sequence[int]) -> list[Node]:
        """The nodes of a prefix's blocks, as far as they are there and written."""
        path = []
        for key in keys:
            node = self.nodes.get(key)
            if node is None or not node.ready:
                break
            path.append(node)
        return path

    def add(self, key: int, parent: Node, kv: Blocks, cost_s: float) -> Node:
        node = self.nodes[key] = Node(key, parent, kv, cost_s)
        parent.children += 1
        self.evictable_blocks += len(kv)
        return node

    def remove(self, node: Node) -> Blocks:
        """Take out a leaf without a state; its pool blocks are the caller's."""
        assert node.parent is not None
        assert node.children == node.locks == len(node.state) == 0
        del self.nodes[node.key]
        node.parent.children -= 1
        node.serial = 0
        self.evictable_blocks -= len(node.kv)
        return node.kv

    def set_state(self, node: Node, state: Blocks) -> None:
        node.state = state
        self.evictable_blocks += len(state)

    def drop_state(self, node: Node) -> Blocks:
        """Take a node's state, which nobody has locked; its pool blocks are the caller's."""
        assert not node.state_locks
        state, node.state, node.state_ready = node.state, (), False
        node.serial = 0
        self.evictable_blocks -= len(state)
        return state

    def lock(self, node: Node) -> None:
        """Keep a node, and all before it."""
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self.evictable_blocks -= len(at.kv)
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            at.locks -= 1
            if at.locks == 0:
                self.evictable_blocks += len(at.kv)
            at = at.parent

    def lock_state(self, node: Node) -> None:
        if node.state_locks == 0:
            self.evictable_blocks -= len(node.state)
        node.state_locks += 1

    def unlock_state(self, node: Node) -> None:
        node.state_locks -= 1
        if node.state_locks == 0:
            self.evictable_blocks += len(node.state)
