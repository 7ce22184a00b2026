"""Host memory in front, a disk directory or a distributed store behind: written to both, read from the first that has
it. What neither has may come from another site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_prfaas.store.hits import Hit, Need, best_hit
from sglang_prfaas.store.host_tier import HostTier
from sglang_prfaas.store.identity import object_name
from sglang_prfaas.store.objects import ObjectStore
from sglang_prfaas.store.remote import RemoteTier
from sglang_prfaas.store.stats import Counters


class TieredStore:
    """Pages of one shard of one model, by component and page hash. Safe for several threads, of which one writes."""

    def __init__(
        self,
        backend: ObjectStore,
        host: HostTier | None,
        namespaces: Mapping[str, str],
        counters: Counters,
        remote: RemoteTier | None = None,
    ) -> None:
        self.backend = backend
        self.host = host
        self.remote = remote
        self.counters = counters
        self._namespaces = namespaces

    def contains(self, component: str, key: str) -> bool:
        """Whether a tier has it, or it is on its way from another site."""
        held = self.host is not None and self.host.contains(component, key)
        coming = not held and self.remote is not None and self.remote.coming(component, key)
        return held or coming or self.backend.contains(self._name(component, key))

    def hit(self, keys: Sequence[str], needs: Sequence[Need] = (), prefix_pages: int = 0) -> Hit:
        """The longest usable prefix of the pages `keys`; what is to be fetched for it is on its way. `prefix_pages`:
        pages before `keys`."""
        hit = best_hit(keys, needs, self.contains)
        if self.remote is not None:
            hit = self.remote.extend(keys, needs, hit, self.contains, prefix_pages)
        self.counters.add(queries=1, queried_pages=len(keys), usable_pages=hit.pages)
        return hit

    def read(
        self, component: str, keys: Sequence[str], outs: Sequence[memoryview], prefix: Sequence[str] | None = None
    ) -> list[bool]:
        """Fill each of `outs`; stops at the first that no tier has. `prefix`: the pages before `keys`, if known: a
        model without state then gets them into host memory too."""
        count, fetched = self._read_host(component, keys, outs), False
        for key, out in zip(keys[count:], outs[count:], strict=True):
            if not (self.remote is not None and self.remote.read(component, key, out)):
                if not self.backend.read(self._name(component, key), out):
                    self.counters.add(misses=1)
                    break
                self.counters.add(backend_hits=1, backend_read_bytes=len(out))
            fetched = True
            count += 1
        if self.host is not None and component == "kv" and self.host.state_component is None and count:
            if fetched and prefix is not None:
                self.host.add(prefix, list(zip(keys[:count], outs[:count], strict=True)))
            else:
                self.host.used(keys[count - 1])
        return [index < count for index in range(len(keys))]

    def _read_host(self, component: str, keys: Sequence[str], outs: Sequence[memoryview]) -> int:
        """Fill the first of `outs` from host memory: how many. They stay there until all are copied."""
        if self.host is None:
            return 0
        with self.host.lease(component, keys) as held:
            for index in range(len(held)):
                held.copy(index, outs[index])
        count = len(held)
        if count:
            self.counters.add(host_hits=count, host_read_bytes=sum(map(len, outs[:count])))
        return count

    def write(
        self,
        component: str,
        keys: Sequence[str],
        payloads: Sequence[memoryview],
        prefix: Sequence[str] | None = None,
    ) -> list[bool]:
        """Keep pages or states in every tier. True: the tier behind has it. `prefix`: the pages before `keys`, without
        which they do not go into host memory."""
        if self.host is not None and prefix is not None:
            self._write_host(self.host, component, keys, payloads, prefix)
        kept = []
        for key, payload in zip(keys, payloads, strict=True):
            kept.append(self.backend.write(self._name(component, key), payload))
            if kept[-1]:
                self.counters.add(backend_written_bytes=len(payload))
        return kept

    def close(self) -> None:
        if self.remote is not None:
            self.remote.close()
        self.backend.close()

    def _write_host(
        self,
        host: HostTier,
        component: str,
        keys: Sequence[str],
        payloads: Sequence[memoryview],
        prefix: Sequence[str],
    ) -> None:
        pages = list(zip(keys, payloads, strict=True))
        if component == "kv" and host.state_component is None:
            host.add(prefix, pages)
            return
        if component == host.state_component:
            host.begin([*prefix, *keys], range(len(prefix) + 1, len(prefix) + len(keys) + 1))
        for key, payload in pages:
            host.put(component, key, payload)

    def _name(self, component: str, key: str) -> str:
        return object_name(self._namespaces[component], key)
