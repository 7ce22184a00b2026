"""A trained tiny model on disk, as SGLang loads it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"


def save(model: Any, directory: Path) -> None:
    """Add a model's weights, under Hugging Face's names, to the directory that `make_tiny_model` made."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as fresh:
        model.save_pretrained(fresh)
        # transformers writes a config of its own: SGLang reads that of the tiny model.
        shutil.move(Path(fresh) / WEIGHTS, directory / WEIGHTS)
