"""What happened to a server's cache, as values: what events of SGLang, or of our plugin, say to the index."""

from __future__ import annotations

from msgspec import Struct

from sglang_prfaas.prefix_cache.block_hash import BlockHashes
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier


class Stored(Struct, frozen=True, eq=False):
    """These blocks (any order) are now held. For `Part.STATE`: the state after each block's last token is."""

    hashes: BlockHashes
    tier: Tier
    part: Part = Part.KV


class Removed(Struct, frozen=True, eq=False):
    """These blocks are no longer held on that tier. KV that goes takes the state on its tier along."""

    hashes: BlockHashes
    tier: Tier
    part: Part = Part.KV


class Cleared(Struct, frozen=True):
    """The cache is empty on all tiers."""


Change = Stored | Removed | Cleared
