"""Names of objects: what must be equal for two servers to exchange cached bytes. Pure.

The page's hash stands for all tokens up to its end, and SGLang seeds it with `cache_salt` and the LoRA adapter, so
tenants and adapters share no name.
"""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct

FORMAT = 1
"""Part of every name: raise it when the meaning of stored bytes changes."""


class ModelIdentity(Struct, frozen=True, kw_only=True):
    """What the cached values depend on, whatever the shard. `model`: path or name with `fingerprint` of its files."""

    model: str
    fingerprint: str
    revision: str = ""
    dtype: str
    quantization: str = ""
    kv_cache_dtype: str
    page_tokens: int


class ComponentIdentity(Struct, frozen=True, kw_only=True):
    """One kind of page. `shard`: which part of the layers and heads it holds, equal in all ranks that hold the same;
    `layout`: the order of its bytes."""

    name: str
    dtype: str
    page_bytes: int
    layout: str
    shard: str


def namespace(model: ModelIdentity, component: ComponentIdentity) -> str:
    """First part of the names of all objects of one kind: 32 hex digits and the component."""
    digest = hashlib.sha256(msgspec.msgpack.encode((FORMAT, model, component))).hexdigest()[:32]
    return f"{digest}/{component.name}"


def object_name(namespace: str, page_hash: str) -> str:
    return f"{namespace}/{page_hash}"


def shard_of(*, replicated: bool, tp: tuple[int, int], pp: tuple[int, int], cp: tuple[int, int]) -> str:
    """The shard of a rank, from (rank, size) of each kind of parallelism. `replicated`: every tensor-parallel rank
    holds the same bytes (MLA), whatever the width."""
    parts = [] if replicated else [f"tp{tp[0]}of{tp[1]}"]
    parts += [f"{kind}{rank}of{size}" for kind, (rank, size) in (("pp", pp), ("cp", cp)) if size > 1]
    return "-".join(parts) or "all"
