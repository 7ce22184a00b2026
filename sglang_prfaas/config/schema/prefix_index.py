"""`[prefix_index]`: what the router knows of prefix caches."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sglang_prfaas.config.schema.base import Config

CheckpointMode = Literal["auto", "on", "off"]


class PrefixIndexConfig(Config, frozen=True):
    """The router's index of what every server has in its prefix cache."""

    enabled: Annotated[
        bool, Meta(description="Ask agents, and servers that name kv_events, and route by what is cached.")
    ] = True
    max_blocks: Annotated[
        int, Meta(ge=1, le=1 << 30, description="Distinct blocks of all sites that it keeps; 13.4 bytes each.")
    ] = 4_000_000
    max_servers: Annotated[int, Meta(ge=1, le=4096, description="Caches that it tells apart.")] = 512
    interval_s: Annotated[
        float, Meta(gt=0, description="Seconds between two questions to an agent while nothing changes.")
    ] = 0.1
    min_tokens: Annotated[
        int, Meta(ge=0, description="Prompts that are estimated to have fewer tokens are not looked up.")
    ] = 64
    checkpoints: Annotated[
        CheckpointMode,
        Meta(
            description="Whether a prefix can be used only up to a state checkpoint, as with linear attention and "
            "sliding windows. auto: read from the model's config.json."
        ),
    ] = "auto"
    learn: Annotated[
        bool, Meta(description="Correct the index by the cached tokens that prefill servers name in their answers.")
    ] = True
