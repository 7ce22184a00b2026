"""SGLang's HiCache storage backend over `sglang_prfaas.store`, loaded with `--hicache-storage-backend dynamic`.

Copies pages between HiCache's host pools and the store; names, tiers and hit policies are the store's. Where the site's
configuration comes from: the extra configuration that `site.hicache` writes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.runtime_context import get_server_args

from sglang_prfaas import env
from sglang_prfaas.config.schema import PrefixCacheConfig
from sglang_prfaas.env import transport_from_env
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.prefix_cache.groups import Group, PoolLayout
from sglang_prfaas.sglang_plugin.hicache_peers import remote_tier
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.fingerprint import model_fingerprint
from sglang_prfaas.store.hits import Need
from sglang_prfaas.store.host_tier import HostTier
from sglang_prfaas.store.identity import ComponentIdentity, ModelIdentity, namespace, shard_of
from sglang_prfaas.store.mooncake import MooncakeStore
from sglang_prfaas.store.objects import ObjectStore, consecutive
from sglang_prfaas.store.staging import on_the_heap
from sglang_prfaas.store.stats import Counters, StatsFile, StatsWriter
from sglang_prfaas.store.tiers import TieredStore

KV = PoolName.KV.value
STATES = {PoolName.MAMBA.value: "linear", PoolName.SWA.value: "window"}
ONLY_V1 = (
    '--hicache-storage-backend-extra-config: write "interface_v1": 1, or let [prefix_cache] set it. Without it SGLang '
    "hands over single pages with no word of the prompt before them and none of the states of a hybrid model, so "
    "that a hit could not be told from a miss"
)
_ARGS = ("model_path", "revision", "dtype", "quantization", "kv_cache_dtype", "json_model_override_args")


class PrfaasHiCacheStore(HiCacheStorage):
    """One rank's view of the store. SGLang calls it from its backup thread and its prefetch threads.

    Raises ConfigError, LaunchError or OSError while the server starts; then a fault is a miss.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        self.rank = storage_config
        known = {field.name for field in msgspec.structs.fields(PrefixCacheConfig)}
        given = {key: value for key, value in (storage_config.extra_config or {}).items() if key in known}
        try:
            self.config = msgspec.convert(given, PrefixCacheConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--hicache-storage-backend-extra-config: {error}") from None
        if not (storage_config.extra_config or {}).get("interface_v1"):
            raise ConfigError(ONLY_V1)
        self._least_tokens = int((storage_config.extra_config or {}).get("prefetch_threshold", 0))
        self.counters = Counters()
        self.store: TieredStore | None = None
        self._pools: dict[str, Any] = {}
        self._namespaces: dict[str, str] = {}
        self._page_forms: dict[str, tuple[torch.dtype, int]] = {}
        self._stats: StatsWriter | None = None

    # --- what SGLang registers at the start -----------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(host_pool_name) != KV:
            self._register(str(host_pool_name), host_pool)

    def on_host_pools_registered(self) -> None:
        backend, host = self._backend(), self._host_tier()
        remote = remote_tier(
            self.config,
            transport_from_env(os.environ),
            namespaces=self._namespaces,
            payload_bytes={name: dtype.itemsize * length for name, (dtype, length) in self._page_forms.items()},
            page_tokens=int(self._pools[KV].page_size),
            least_tokens=self._least_tokens,
            keep=backend.write,
            counters=self.counters,
            open_room=host.open_room if host is not None and self.config.transfer_floor else on_the_heap,
        )
        self.store = TieredStore(backend, host, self._namespaces, self.counters, remote)
        directory = self.config.stats_dir or (self.config.disk_dir and os.path.join(self.config.disk_dir, "stats"))
        if directory:
            self._stats = StatsWriter(Path(directory) / f"{self._name()}.json", self._stats_file)

    # --- which prefixes exist -------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        return self._ready().hit(keys, prefix_pages=len(_prefix(extra_info) or ())).pages

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        needs = [_need(transfer) for transfer in pool_transfers or ()]
        hit = self._ready().hit(keys, needs, len(_prefix(extra_info) or ()))
        return PoolTransferResult(hit.pages, dict(hit.found), list(hit.usable))

    # --- pages of KV ----------------------------------------------------------------------------------------------

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return self._get(KV, keys, host_indices, _prefix(extra_info))

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return self._set(KV, keys, host_indices, _prefix(extra_info))

    # --- pages of the other pools ---------------------------------------------------------------------------------

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._get(str(t.name), t.keys or [], t.host_indices, _prefix(extra_info)) for t in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._set(str(t.name), t.keys or [], t.host_indices, _prefix(extra_info)) for t in transfers}

    # --- the older interface, which SGLang does not call with `interface_v1` --------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        raise ConfigError(ONLY_V1)

    batch_get = set = batch_set = get

    def close(self) -> None:
        if self._stats is not None:
            self._stats.close()
        if self.store is not None:
            self.store.close()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _ready(self) -> TieredStore:
        if self.store is None:
            raise RuntimeError("SGLang used the storage backend before it had registered its host pools")
        return self.store

    def _get(
        self, component: str, keys: list[str], host_indices: torch.Tensor | None, prefix: list[str] | None
    ) -> list[bool]:
        pool = self._pools[component]
        places = _places(pool, keys, host_indices)
        if places is None:
            return [False] * len(keys)
        dtype, length = self._page_form(component)
        pages = [torch.empty(length, dtype=dtype) for _ in keys]
        done = self._ready().read(component, keys, [_bytes(page) for page in pages], prefix)
        for index in range(consecutive(done)):
            pool.set_from_flat_data_page(places[index], pages[index])
        return done

    def _set(
        self, component: str, keys: list[str], host_indices: torch.Tensor | None, prefix: list[str] | None
    ) -> list[bool]:
        pool = self._pools[component]
        places = _places(pool, keys, host_indices)
        if places is None:
            return [False] * len(keys)
        pages = [_bytes(pool.get_data_page(place, flat=True)) for place in places]
        done = self._ready().write(component, keys, pages, prefix)
        return done

    def _register(self, component: str, pool: Any) -> None:
        self._pools[component] = pool
        dtype, length = self._page_form(component)
        args = get_server_args()
        values = {name: str(getattr(args, name, None) or "") for name in _ARGS}
        model = ModelIdentity(
            model=self.config.model_id or values["model_path"].rstrip("/").rpartition("/")[2],
            fingerprint=model_fingerprint(values["model_path"]) + values["json_model_override_args"],
            revision=values["revision"],
            dtype=values["dtype"],
            quantization=values["quantization"],
            kv_cache_dtype=values["kv_cache_dtype"],
            page_tokens=int(self._pools[KV].page_size),
        )
        identity = ComponentIdentity(
            name=component,
            dtype=str(dtype),
            page_bytes=length * dtype.itemsize,
            layout=_layout(pool),
            shard=self._shard(component),
        )
        self._namespaces[component] = namespace(model, identity)

    def _page_form(self, component: str) -> tuple[torch.dtype, int]:
        """dtype and number of elements of one flat page."""
        if component not in self._page_forms:
            page = self._pools[component].get_data_page(0, flat=True)
            self._page_forms[component] = (page.dtype, page.numel())
        return self._page_forms[component]

    def _shard(self, component: str) -> str:
        rank = self.rank
        shard = shard_of(
            replicated=rank.is_mla_model and component != PoolName.MAMBA.value,
            tp=(rank.tp_rank, rank.tp_size),
            pp=(rank.pp_rank, rank.pp_size),
            cp=(rank.attn_cp_rank, rank.attn_cp_size),
        )
        return f"{shard}-dcp{rank.dcp_rank}of{rank.dcp_size}" if rank.dcp_size > 1 else shard

    def _host_tier(self) -> HostTier | None:
        """Host memory takes KV and one kind of state; a model with further pools has them in the tier behind only."""
        states = [component for component in self._pools if component in STATES]
        if not self.config.host_bytes or len(states) > 1:
            return None
        sizes = {component: dtype.itemsize * n for component, (dtype, n) in self._page_forms.items()}
        groups = [Group(name=KV, kind="full", entry_bytes=sizes[KV])]
        groups += [Group(name=state, kind=STATES[state], entry_bytes=sizes[state]) for state in states]
        layout = PoolLayout(block_bytes=sizes[KV], block_tokens=int(self._pools[KV].page_size), groups=tuple(groups))
        return HostTier(
            layout,
            max(self.config.host_bytes, sizes[KV]),
            self.counters,
            prefix_floor=self.config.prefix_floor,
            transfer_floor=self.config.transfer_floor,
        )

    def _backend(self) -> ObjectStore:
        if self.config.backend == "mooncake":
            return MooncakeStore(self.config, self.counters)
        return DiskStore(Path(self.config.disk_dir), self.config.disk_bytes, self.counters)

    def _name(self) -> str:
        server = "-".join(filter(None, (os.environ.get(env.SITE), os.environ.get(env.SERVER)))) or f"pid{os.getpid()}"
        return f"{server}-tp{self.rank.tp_rank}-pp{self.rank.pp_rank}-dp{self.rank.dp_rank}"

    def _stats_file(self) -> StatsFile:
        backend, host, remote = self._ready().backend, self._ready().host, self._ready().remote
        used = 0
        if isinstance(backend, DiskStore):
            with contextlib.suppress(OSError):
                used = backend.usage.used_bytes()
        return StatsFile(
            name=self._name(),
            backend=self.config.backend,
            pid=os.getpid(),
            host_limit_bytes=self.config.host_bytes,
            backend_limit_bytes=self.config.disk_bytes if isinstance(backend, DiskStore) else 0,
            host_used_bytes=host.used_bytes() if host is not None else 0,
            backend_used_bytes=used,
            counters=self.counters.snapshot(),
            peers=remote.peers() if remote is not None else (),
        )


def _need(transfer: PoolTransfer) -> Need:
    return Need(
        component=str(transfer.name),
        policy=PoolHitPolicy(transfer.hit_policy).value,
        trailing=len(transfer.keys or ()) or 1,
        keys=tuple(transfer.keys or ()),
        block_pages=transfer.block_pages,
        group_pages=transfer.group_pages,
    )


def _prefix(extra_info: HiCacheStorageExtraInfo | None) -> list[str] | None:
    """The pages before those of the call; None where SGLang does not say."""
    return extra_info.prefix_keys if extra_info is not None else None


def _places(pool: Any, keys: list[str], host_indices: torch.Tensor | None) -> list[int] | None:
    """Where each page begins in its host pool; None where SGLang gives no place for each."""
    page_tokens = int(getattr(pool, "page_size", 1) or 1)
    if host_indices is None or host_indices.numel() != len(keys) * page_tokens:
        return None
    return [int(index) for index in host_indices[::page_tokens].tolist()]


def _bytes(page: torch.Tensor) -> memoryview:
    return memoryview(page.contiguous().view(torch.uint8).numpy()).cast("B")


def _layout(pool: Any) -> str:
    """What fixes the order of a page's bytes."""
    names = ("layout", "layer_num", "num_mamba_layers", "head_num", "head_dim", "v_head_dim", "kv_cache_dim")
    names += ("start_layer", "end_layer", "temporal_state_shape", "conv_state_shapes", "storage_format_tag")
    values = [f"{name}={getattr(pool, name)}" for name in names if getattr(pool, name, None) is not None]
    return " ".join([type(pool).__name__, *values])
