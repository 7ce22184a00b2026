"""A trained tiny model on disk, as SGLang loads it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
DENSE = re.compile(r"\.block_sparse_moe\.(gate|up|down)_proj\.")


def save(model: Any, directory: Path) -> None:
    """Add a model's weights to the directory that `make_tiny_model` made, under the names of published checkpoints:
    transformers' own, but for Kimi Linear's dense layer, whose MLP it writes as one of experts."""
    with tempfile.TemporaryDirectory() as fresh:
        model.save_pretrained(fresh)
        weights = load_file(Path(fresh) / WEIGHTS)
    named = {DENSE.sub(r".mlp.\1_proj.", name): weight for name, weight in weights.items()}
    save_file(named, directory / WEIGHTS, metadata={"format": "pt"})
