"""Write a tiny model's directory, once and whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_prfaas.tiny_models.configs import BOS, EOS, PAD
from sglang_prfaas.tiny_models.families import family_spec
from sglang_prfaas.tiny_models.tokenizer import write_tokenizer

RECIPE = 1  # Raise when files written from the same config change, so that old directories are made again.
STAMP = "tiny_model.json"


def make_tiny_model(family: str, directory: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Make the model of ``family`` in ``directory`` and return it, absolute. changes: keys of its ``config.json`` that
    are to be others than the family's, such as more layers.

    A complete directory of the same recipe is kept as it is. Otherwise the files are written next to it and renamed
    into place, so a reader never sees half a model. Raises ValueError for an unknown family, or when ``directory``
    holds something that is not a tiny model.
    """
    spec = family_spec(family)
    directory = Path(directory).absolute()
    config = {**spec.config, **(changes or {})}
    stamp = json.dumps({"recipe": RECIPE, "family": family, "config": config}, sort_keys=True)
    if _is_complete(directory, stamp):
        return directory
    if directory.exists() and not (directory / STAMP).is_file() and any(directory.iterdir()):
        raise ValueError(f"{directory} exists and holds no tiny model; choose another directory or empty it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (fresh / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        (fresh / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
        write_tokenizer(fresh)
        (fresh / STAMP).write_text(stamp)
        fresh.chmod(0o755)
        _swap_in(fresh, directory, stamp)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def _is_complete(directory: Path, stamp: str) -> bool:
    path = directory / STAMP
    return path.is_file() and path.read_text() == stamp


def _swap_in(fresh: Path, directory: Path, stamp: str) -> None:
    """Rename ``fresh`` to ``directory``; an older model steps aside. Another process may win the race."""
    if directory.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
        try:
            os.rename(directory, aside / "old")
        except FileNotFoundError:
            pass
        shutil.rmtree(aside)
    try:
        os.rename(fresh, directory)
    except OSError:
        if not _is_complete(directory, stamp):
            raise
