"""What profiling reads of a model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.core.kv_layout import KvLayout, layout_of
from sglang_prfaas.errors import ConfigError

DEFAULT_VOCABULARY = 1024
"""Token ids below this exist in every model; for one whose config.json cannot be read."""


class ModelFacts(Struct, frozen=True, kw_only=True):
    """layout: None where the config does not say which layers keep what; `why` then has the reason."""

    layout: KvLayout | None
    vocabulary: int = DEFAULT_VOCABULARY
    context_tokens: int = 0
    """0: not said."""
    why: str = ""


def read_model(path: str, *, must_exist: bool) -> ModelFacts:
    """The facts of a config.json, or of a directory or a model in the local Hugging Face cache that has one.

    Raises ConfigError where it must exist and does not.
    """
    try:
        config = _read(path)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        if must_exist:
            raise ConfigError(f"--model-config {path}: no config.json can be read there: {error}") from error
        return ModelFacts(layout=None, why=f"the model's config.json cannot be read here ({path}); give --model-config")
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    try:
        layout, why = layout_of(config), ""
    except (ConfigError, KeyError, TypeError) as error:
        layout, why = None, f"config.json does not say which layers keep what: {error}"
    return ModelFacts(
        layout=layout,
        vocabulary=_positive(text.get("vocab_size")) or DEFAULT_VOCABULARY,
        context_tokens=_positive(text.get("max_position_embeddings")) or _positive(text.get("model_max_length")),
        why=why,
    )


def _read(path: str) -> dict[str, Any]:
    place = Path(path)
    if place.is_dir():
        place = place / "config.json"
    if place.is_file():
        found = msgspec.json.decode(place.read_bytes())
    else:
        from transformers import PretrainedConfig

        found, _ = PretrainedConfig.get_config_dict(path, local_files_only=True)
    if not isinstance(found, dict) or not found:
        raise ValueError("it is not a JSON object")
    return found


def _positive(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
