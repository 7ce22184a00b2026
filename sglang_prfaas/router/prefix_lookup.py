"""The router's index of all prefix caches: what of a prompt each server has, and what answers teach about it.

A server looks its own cache up again for every request: a wrong entry costs time, never a token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.config.schema import PrefixIndexConfig, RouterConfig
from sglang_prfaas.core.kv_layout import KvLayout, layout_of
from sglang_prfaas.errors import ConfigError, PoolFullError
from sglang_prfaas.prefix_cache.block_hash import Namespace, PromptHashes
from sglang_prfaas.prefix_cache.change_log import HolderChange
from sglang_prfaas.prefix_cache.changes import Change, Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier
from sglang_prfaas.prefix_cache.index import GlobalIndex
from sglang_prfaas.prefix_cache.matching import Holder, Match
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.metrics import Gauge
from sglang_prfaas.scheduler.types import SitePrefix

logger = logging.getLogger(__name__)

MAX_PROMPT_BLOCKS = 8192
"""A longer prompt is looked up as far as that: 128K tokens in blocks of 16, about 4 ms."""
_MAX_CORRECTIONS = 8
_STATE_KEYS = (
    "linear_attn_config",
    "linear_num_key_heads",
    "mamba_d_state",
    "ssm_cfg",
    "hybrid_override_pattern",
    "hybrid_layer_pattern",
    "attn_type_list",
)
_STATE_MODELS = ("bailing_hybrid", "minimax", "falcon_h1", "bamba")

Samples = list[tuple[tuple[str, ...], float]]


class CacheFigures(Struct):
    """Counted since the start. Tokens are of prompts that were looked up; hits are what prefill servers told."""

    lookups: int = 0
    matches: int = 0
    prompt_tokens: int = 0
    promised_tokens: int = 0
    """Cached on the server taken, as the index had it."""
    told_prompt_tokens: int = 0
    hit_tokens: int = 0
    """Cached on the server taken, as it told."""
    broken_promises: int = 0
    dropped_blocks: int = 0


class PrefixIndex:
    """`PrefixLookup` over a `GlobalIndex`. Belongs to the event loop."""

    def __init__(self, config: RouterConfig, adapter_id: Callable[[str], str | None] = lambda name: None) -> None:
        """adapter_id: SGLang's id of a LoRA adapter, None where it is not known."""
        self._adapter_id = adapter_id
        settings = config.prefix_index
        self.fetches = config.policy.fetch_prefixes
        self.index = GlobalIndex(settings.max_blocks, 2 * settings.max_servers)
        self.figures = CacheFigures()
        self.by_site: dict[str, CacheFigures] = {}
        model = model_config(config.router.model)
        self.hybrid = needs_checkpoints(settings, model)
        self._layout = _layout(model)
        self._settings = settings
        self._names = {config.router.model, config.router.served_model_name, "default", ""}
        self._block_tokens: dict[Holder, int] = {}
        self._full = False

    # --- what is known ------------------------------------------------------------------------------------------------

    def apply(self, entry: HolderChange) -> None:
        """Take in what happened to a server's cache."""
        if entry.block_tokens:
            self._block_tokens[entry.holder] = entry.block_tokens
        try:
            self.index.apply(entry.holder, (entry.change,))
        except PoolFullError as error:
            if not self._full:
                logger.warning("%s; set prefix_index.max_servers higher", error)
            self._full = True

    def forget(self, site: str, server: str | None = None) -> None:
        """Drop what is known of a site, or of one server of it."""
        for holder in self.index.holders:
            if holder.site == site and server in (None, holder.server):
                self.index.forget(holder)
                self._block_tokens.pop(holder, None)

    # --- what is asked ------------------------------------------------------------------------------------------------

    def wants(self, body: ParsedBody, estimate: Callable[[], int]) -> bool:
        """Whether the exact tokens of a prompt could make a difference."""
        return (
            self.index.blocks > 0
            and body.prompt is not None
            and self._namespace(body) is not None
            and estimate() >= self._settings.min_tokens
        )

    def match(self, body: ParsedBody) -> Mapping[str, SitePrefix]:
        """Cached prefix of the prompt by site and server."""
        if body.token_ids is None:
            return {}
        found: dict[str, dict[str, int]] = {}
        for holder, tokens in self._cached(body).items():
            servers = found.setdefault(holder.site, {})
            servers[holder.server] = max(tokens, servers.get(holder.server, 0))
        return {site: SitePrefix(servers=servers) for site, servers in found.items()}

    def looked_up(self, body: ParsedBody, held: bool) -> None:
        """Count a request that was looked up."""
        self.figures.lookups += 1
        self.figures.matches += held
        self.figures.prompt_tokens += len(body.token_ids or ())

    def told(self, body: ParsedBody, site: str, server: str, promised: int, cached: int) -> None:
        """A prefill server named the tokens of a prompt that it had cached; `promised` is what it was taken for."""
        total = len(body.token_ids or ())
        for figures in (self.figures, self.by_site.setdefault(site, CacheFigures())):
            figures.told_prompt_tokens += total
            figures.hit_tokens += min(cached, total)
            figures.promised_tokens += promised
            figures.broken_promises += cached < promised
        if not self._settings.learn:
            return
        if cached < promised:
            self._drop_beyond(body, site, server, cached)
        elif self.hybrid and cached > promised:
            self._add_checkpoint(body, site, server, cached)

    def _drop_beyond(self, body: ParsedBody, site: str, server: str, cached: int) -> None:
        """The server has less than the index says: take out what it was wrong about.

        With checkpoints only the state is gone for certain, and there may be more of them beyond the one promised."""
        for holder in [h for h in self.index.holders if (h.site, h.server) == (site, server)]:
            for _ in range(_MAX_CORRECTIONS):
                tokens = self._cached(body).get(holder, 0)
                if tokens <= cached:
                    break
                size = self._block_tokens[holder]
                hashes = body.hashes[size].upto(tokens // size)
                gone = hashes[-1:] if self.hybrid else hashes[cached // size :]
                part = Part.STATE if self.hybrid else Part.KV
                changes: list[Change] = [Removed(gone, tier, part) for tier in Tier]
                self.figures.dropped_blocks += len(gone)
                self.index.apply(holder, changes)

    def _add_checkpoint(self, body: ParsedBody, site: str, server: str, cached: int) -> None:
        """The server has a state that no event told of, as at the end of a chunk of a long prompt."""
        for holder in [h for h in self.index.holders if (h.site, h.server) == (site, server)]:
            size = self._block_tokens.get(holder, 0)
            hashes = body.hashes.get(size)
            if hashes is None or cached % size or cached // size > len(hashes):
                continue
            known = self.index.match(hashes).by_holder.get(holder)
            if known is not None and known.disk_blocks >= cached // size:
                state = hashes.upto(cached // size)[-1:]
                self.index.apply(holder, (Stored(state, Tier.DEVICE, Part.STATE),))

    def _cached(self, body: ParsedBody) -> dict[Holder, int]:
        assert body.token_ids is not None
        namespace = self._namespace(body)
        if namespace is None or len(body.token_ids) < 2:
            return {}
        found: dict[Holder, int] = {}
        for size in set(self._block_tokens.values()):
            hashes = body.hashes.get(size)
            if hashes is None:
                # The last token is always computed: a cached prefix ends before it.
                tokens = body.token_ids[: min(len(body.token_ids) - 1, size * MAX_PROMPT_BLOCKS)]
                try:
                    hashes = body.hashes[size] = PromptHashes(tokens, size, namespace)
                except ValueError:
                    return {}
            match: Match = self.index.match(hashes)
            for holder in match.by_holder:
                if self._block_tokens.get(holder) == size and (n := match.cached_tokens(holder, self.hybrid)):
                    found[holder] = n
        return found

    def _namespace(self, body: ParsedBody) -> Namespace | None:
        """What separates the prompt's blocks from others; None where only its server could know.

        SGLang mixes the internal id of a LoRA adapter into the hashes; an `extra_key` it leaves out of them, so that
        blocks under another key look the same."""
        fields = body.fields
        if fields.extra_key is not None:
            return None
        adapter_id = None
        if fields.lora_path or (body.model or "").partition(":")[2] or (body.model or "") not in self._names:
            adapter_id = self._adapter_id(body.adapter) if body.adapter is not None else None
            if adapter_id is None:
                return None
        salt = body.cache_salt if body.cache_salt is not None else fields.cache_salt
        if salt is not None and not isinstance(salt, str):
            return None  # one for each prompt of a batch
        return Namespace(cache_salt=salt or None, extra_key=adapter_id)

    # --- what is shown ------------------------------------------------------------------------------------------------

    def gauges(self) -> list[Gauge]:
        """Figures for `/metrics`."""
        held: Samples = [
            ((holder.site, holder.server, tier), getattr(blocks, tier))
            for holder, blocks in self.index.held().items()
            for tier in ("device", "host", "disk", "states")
        ]
        totals = msgspec.structs.asdict(self.figures)
        counted: Samples = [((name,), value) for name, value in totals.items()]
        hits: Samples = [((site,), figures.hit_tokens) for site, figures in self.by_site.items()]
        told: Samples = [((site,), figures.told_prompt_tokens) for site, figures in self.by_site.items()]
        return [
            ("prfaas_router_cached_blocks", "Blocks in the index, by tier.", ("site", "server", "tier"), held),
            ("prfaas_router_index_blocks", "Distinct blocks in the index.", (), [((), self.index.blocks)]),
            ("prfaas_router_index_bytes", "Memory of the index.", (), [((), self.index.memory_bytes)]),
            ("prfaas_router_index_dropped_blocks", "Blocks left out.", (), [((), self.index.dropped_blocks)]),
            ("prfaas_router_prefix_lookups", "What was looked up, and found.", ("figure",), counted),
            ("prfaas_router_cache_hit_tokens", "Cached tokens that prefill servers told.", ("site",), hits),
            ("prfaas_router_cache_prompt_tokens", "Tokens of the prompts they were told of.", ("site",), told),
        ]

    def describe(self) -> dict[str, Any]:
        """For `GET /cache`."""
        held = self.index.held()
        return {
            "enabled": True,
            "checkpoints": self.hybrid,
            "blocks": self.index.blocks,
            "max_blocks": self.index.max_blocks,
            "dropped_blocks": self.index.dropped_blocks,
            "index_bytes": self.index.memory_bytes,
            "bytes_per_token": self._layout.full_bytes_per_token if self._layout is not None else None,
            "state_bytes": self._layout.state_bytes if self._layout is not None else None,
            "figures": self.figures,
            "sites": self.by_site,
            "caches": [
                {
                    "site": holder.site,
                    "server": holder.server,
                    "dp_rank": holder.dp_rank,
                    "block_tokens": self._block_tokens.get(holder, 0),
                    "held": blocks,
                }
                for holder, blocks in sorted(held.items())
            ],
        }


def model_config(model: str) -> Mapping[str, Any] | None:
    """A model's config.json, from its directory or what of the hub is on this machine; None where there is none.

    Nothing is fetched: the tokenizer, loaded before, has brought it along."""
    try:
        found: dict[str, Any] = json.loads(Path(model, "config.json").read_bytes())
        return found
    except (OSError, ValueError):
        if Path(model).is_absolute():
            return None
    from transformers import PretrainedConfig  # takes seconds to import

    try:
        return dict(PretrainedConfig.get_config_dict(model, local_files_only=True)[0])
    except (OSError, ValueError) as error:
        logger.info("%s: no config.json: %s", model, error)
        return None


def needs_checkpoints(settings: PrefixIndexConfig, model: Mapping[str, Any] | None) -> bool:
    """Whether a prefix is usable only where a state was kept: by the settings, or by the model's config.json, without
    which it is taken to be."""
    if settings.checkpoints != "auto":
        return settings.checkpoints == "on"
    return model is None or keeps_states(model)


def _layout(model: Mapping[str, Any] | None) -> KvLayout | None:
    try:
        return layout_of(model) if model is not None else None
    except ConfigError:
        return None


def keeps_states(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json names layers that keep their state at checkpoints only: linear attention, state
    spaces, sliding windows."""
    text = config.get("text_config")
    if isinstance(text, dict) and keeps_states(text):
        return True
    if any(config.get(key) for key in _STATE_KEYS):
        return True
    kinds = {str(kind) for kind in config.get("layer_types") or config.get("layers_block_type") or ()}
    return bool(kinds - {"full_attention", "attention"}) or config.get("model_type") in _STATE_MODELS
