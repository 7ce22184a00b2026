"""Block hashes of a prompt, equal to those that SGLang 0.5.23 puts into its KV events.

A block's digest is SHA-256 over the digest of the block before it and the block's token ids as little-endian 32-bit
words; the published hash is the digest's first 8 bytes, big-endian. A hash therefore stands for the whole prefix up to
the block's end. A tenant's `cache_salt` seeds the chain, so that equal prompts of two tenants share no hash. Source:
SGLang's mem_cache/utils.py, mem_cache/events.py, mem_cache/cpp_utils/hash_binding.cpp, disaggregation/kv_events.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

BlockHashes = NDArray[np.uint64]
"""Published hashes of consecutive blocks, shape [blocks], SGLang's signed 64-bit integers taken as unsigned."""

_SALT_TAG = b"sglang-cache-salt-v1\0"
_NAMESPACE_TAG = b"sglang-kv-event-namespace-v1"


class Namespace(Struct, frozen=True):
    """What separates the caches of equal prompts.

    `extra_key` is SGLang's: the request's extra key followed by the server's internal id of the LoRA adapter. Published
    hashes depend on it in the dynamo event format, and in the default format for requests with a named adapter only;
    leave it None otherwise.
    """

    cache_salt: str | None = None
    extra_key: str | None = None
    dynamo_format: bool = False

    @property
    def chain_seed(self) -> bytes:
        """What the first block's digest starts from: 32 bytes, or none without a salt."""
        return hashlib.sha256(_SALT_TAG + self.cache_salt.encode()).digest() if self.cache_salt else b""

    @property
    def publish_seed(self) -> bytes | None:
        """The key of a second hash over every published hash, None where SGLang applies none."""
        salt = self.cache_salt or None if self.dynamo_format else None
        if salt is None and self.extra_key is None:
            return None
        digest = hashlib.sha256(_NAMESPACE_TAG)
        for part in (self.extra_key, salt):
            if part is None:
                digest.update(b"\x00")
            else:
                encoded = part.encode()
                digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
        return digest.digest()


SHARED = Namespace()
"""The namespace of requests without salt, key and adapter."""


class PromptHashes:
    """The block hashes of one prompt, computed as far as they are asked for.

    Only whole blocks have a hash: `len()` is the number of tokens over `block_tokens`, rounded down. Where speculative
    decoding keys SGLang's cache by pairs of tokens (EAGLE), pass `bigram`. Raises ValueError for a token id outside 32
    bits.
    """

    def __init__(
        self,
        token_ids: Sequence[int] | NDArray[np.integer],
        block_tokens: int,
        namespace: Namespace = SHARED,
        *,
        bigram: bool = False,
    ) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens is {block_tokens}, expected at least 1")
        wide = np.asarray(token_ids)
        words = wide.astype("<u4")
        if words.shape != wide.shape or not np.array_equal(words, wide):
            raise ValueError("token ids must be integers from 0 to 2**32 - 1")
        if bigram:
            words = np.stack((words[:-1], words[1:]), axis=1)
        self.block_tokens = block_tokens
        self._stride_bytes = block_tokens * 4 * (2 if bigram else 1)
        self._count = len(words) // block_tokens
        self._words = words.tobytes()
        self._digest = namespace.chain_seed
        self._publish_seed = namespace.publish_seed
        self._done = 0
        self._hashes = np.empty(self._count, np.uint64)

    def __len__(self) -> int:
        return self._count

    def upto(self, blocks: int) -> BlockHashes:
        """Hashes of the first `blocks` blocks, or of all where there are fewer. The array is shared: do not write."""
        blocks = min(blocks, self._count)
        if blocks > self._done:
            self._extend(blocks)
        return self._hashes[:blocks]

    @property
    def all(self) -> BlockHashes:
        """Hashes of all whole blocks."""
        return self.upto(self._count)

    def _extend(self, blocks: int) -> None:
        fresh = hashlib.sha256(usedforsecurity=False).copy  # a copy costs less than a new context
        words, stride, digest = self._words, self._stride_bytes, self._digest
        digests = []
        for start in range(self._done * stride, blocks * stride, stride):
            context = fresh()
            context.update(digest + words[start : start + stride])
            digest = context.digest()
            digests.append(digest)
        self._digest = digest
        published = np.frombuffer(b"".join(digests), ">u8")[::4].astype(np.uint64)
        if self._publish_seed is not None:
            published = namespaced(published, self._publish_seed)
        self._hashes[self._done : blocks] = published
        self._done = blocks


def namespaced(hashes: BlockHashes, seed: bytes) -> BlockHashes:
    """Published hashes under a namespace's seed, as SGLang's `namespaced_block_hash`."""
    parts = (hashlib.sha256(seed + int(value).to_bytes(8, "big")).digest()[:8] for value in hashes)
    return np.frombuffer(b"".join(parts), ">u8").astype(np.uint64)
