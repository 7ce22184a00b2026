"""Names that requests may carry in `model` and `lora_path`, and which servers have the LoRA adapters they select.

As SGLang 0.5.23 takes them: `model` is the served name, or `base:adapter`; `lora_path` names an adapter. SGLang also
lists adapters in `/v1/models` under names of their own, but takes such a name in `model` for the base model; here it
selects the adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import msgspec
from msgspec import Struct

from sglang_prfaas.core.request import ServerKey
from sglang_prfaas.http import HttpError, UpstreamError
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.registry import Registry, Target

log = logging.getLogger(__name__)

_REFRESH_S = 1.0
_ALL_EVERY = 10
"""Rounds between two in which every server is asked again."""


class Models:
    """The configured names, and what the servers list. Belongs to the event loop."""

    def __init__(
        self, configured: tuple[str, ...], registry: Registry, *, now_s: Callable[[], float], timeout_s: float
    ) -> None:
        """now_s: a monotonic clock. timeout_s: for a server's list."""
        self.configured = frozenset(name for name in configured if name) | {"default"}
        self._registry = registry
        self._now_s = now_s
        self._timeout_s = timeout_s
        self._refreshed_s = -_REFRESH_S
        self._mixed: set[str] = set()
        self._refreshing: asyncio.Task[None] | None = None

    # --- what is known ------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Ask every server that is alive for its list; at most once a second. Waits for one that is under way."""
        if self._refreshing is None or self._refreshing.done():
            if self._now_s() < self._refreshed_s + _REFRESH_S:
                return
            self._refreshed_s = self._now_s()
            self._refreshing = asyncio.create_task(self._ask_all())
        await asyncio.shield(self._refreshing)

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask(target) for target in self._registry.targets() if target.alive))

    async def watch(self, interval_s: float) -> None:
        """Refresh until cancelled: servers without a list every `interval_s`, all of them every ten."""
        count = 0
        while True:
            unknown = [t for t in self._registry.targets() if t.alive and t.models is None]
            await asyncio.gather(*(self._ask(target) for target in unknown))
            if count % _ALL_EVERY == 0:
                await self.refresh()
            count += 1
            await asyncio.sleep(interval_s)

    async def _ask(self, target: Target) -> None:
        try:
            answer = await target.upstream.fetch("GET", "/v1/models", timeout_s=self._timeout_s)
            listed = msgspec.json.decode(answer.body, type=_ModelList)
        except (UpstreamError, msgspec.DecodeError) as exc:
            log.info("%s/%s does not list its models: %s", target.site, target.name, exc)
            return
        target.models = frozenset(card.id for card in listed.data if card.parent is None)
        target.adapters = frozenset(card.id for card in listed.data if card.parent is not None)

    @property
    def bases(self) -> frozenset[str]:
        """Names of the base model."""
        return self.configured.union(*(t.models for t in self._decodes() if t.models is not None))

    @property
    def adapters(self) -> frozenset[str]:
        """Adapters that any decode server lists."""
        return frozenset().union(*(t.adapters for t in self._decodes()))

    def _decodes(self) -> list[Target]:
        return [target for target in self._registry.targets() if target.role == "decode"]

    # --- what is asked ------------------------------------------------------------------------------------------------

    async def select(self, body: ParsedBody) -> frozenset[str]:
        """The adapters that a request wants, after checking that they and its model are there; one that only `model`
        names goes into the body's `lora_path`. Raises HttpError 404 for what is not served here, 400 for a
        contradiction."""
        wanted = self._wanted(body)
        self._check_key(body)
        if wanted is not None and not wanted:
            return wanted
        if wanted is None or not wanted <= self.adapters:
            await self.refresh()  # it may have been loaded since
            wanted = self._wanted(body)
        if wanted is None:
            raise self.unknown(body.model)
        missing = wanted - self.adapters
        if missing and all(target.models is not None for target in self._decodes() if target.alive):
            raise self.not_loaded(min(missing))
        return wanted

    def servers(self, adapters: frozenset[str]) -> frozenset[ServerKey] | None:
        """The servers that have them all, None where all servers do. One whose list is not known counts as if; one that
        tells another id than `adapter_id` has other weights under the name, and does not."""
        if not adapters:
            return None
        targets = list(self._registry.targets())
        having = [t for t in targets if t.models is None or adapters <= t.adapters]
        for name in adapters:
            own = self.adapter_id(name)
            having = [t for t in having if t.adapter_ids.get(name, own) == own]
        return frozenset(t.key for t in having) if len(having) < len(targets) else None

    def adapter_id(self, name: str) -> str | None:
        """SGLang's id of an adapter, which stands for its weights, and which block hashes depend on: what most decode
        servers tell, or else most servers. None where none is known."""
        ids = Counter(t.adapter_ids[name] for t in self._decodes() if name in t.adapter_ids)
        ids = ids or Counter(t.adapter_ids[name] for t in self._registry.targets() if name in t.adapter_ids)
        if len(ids) > 1 and name not in self._mixed:
            log.warning("decode servers have different weights under the name of the LoRA adapter %s", name)
            self._mixed.add(name)
        return max(ids, key=lambda told: (ids[told], told), default=None)

    def unknown(self, name: str | None) -> HttpError:
        """For a name that is neither the model's nor an adapter's."""
        known = ", ".join(sorted((self.bases | self.adapters) - {"default"}))
        return HttpError(
            404, f"The model {name!r} does not exist; served here: {known}.", code="model_not_found", param="model"
        )

    def not_loaded(self, name: str) -> HttpError:
        """For an adapter that no decode server has."""
        loaded = ", ".join(sorted(self.adapters)) or "none"
        return HttpError(
            404,
            f"The LoRA adapter {name!r} is not loaded; loaded: {loaded}. Load it on prefill and decode servers, with "
            "--lora-paths or /load_lora_adapter.",
            code="model_not_found",
            param="model",
        )

    def _wanted(self, body: ParsedBody) -> frozenset[str] | None:
        """Names of adapters, None for an unknown model. Raises HttpError 400."""
        given = body.fields.lora_path
        names = frozenset(name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str))
        names -= {""}
        body.adapter = given if isinstance(given, str) and given else None
        model = body.model
        if model is None or model in self.configured or model in self.bases:
            return names
        adapter = self._adapter_in(model)
        if adapter is None:
            return None
        if names - {adapter}:
            raise HttpError(
                400,
                f"model {model!r} selects the LoRA adapter {adapter!r}, lora_path another, {min(names - {adapter})!r}: "
                "give one.",
                code="two_adapters",
                param="lora_path",
            )
        body.adapter, body.lora_path = adapter, None if names else adapter
        return frozenset((adapter,))

    def _check_key(self, body: ParsedBody) -> None:
        """SGLang puts an adapter's id at the end of the extra key, and nothing between: without the adapter, a client's
        own key that ends so would put the base model's KVCache where the adapter's belongs. Raises HttpError 400."""
        key = body.fields.extra_key
        if key is None or body.adapter is not None:
            return
        keys = tuple(text for text in (key if isinstance(key, list) else [key]) if isinstance(text, str))
        ids = tuple(name for target in self._registry.targets() for name in target.adapter_ids.values())
        if any(text.endswith(ids) for text in keys):
            raise HttpError(
                400,
                "extra_key ends with the id of a LoRA adapter: choose another.",
                code="invalid_key",
                param="extra_key",
            )

    def _adapter_in(self, model: str) -> str | None:
        """The adapter that `model` selects: `base:adapter`, or one that is listed."""
        for base in self.bases:
            if model.startswith(f"{base}:"):
                return model[len(base) + 1 :].strip() or None
        return model if model in self.adapters else None


class _ModelCard(Struct):
    id: str
    parent: str | None = None


class _ModelList(Struct):
    data: list[_ModelCard]
