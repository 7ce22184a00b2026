"""Fingerprints of files of models and adapters, so that caches of different weights under one path are kept apart."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def model_fingerprint(model: str) -> str:
    """32 hex digits over config.json, and the names, sizes and 64 evenly spaced samples of the weight files; equal on
    every host with the same files. Empty where `model` is no directory (a name on a hub). Raises OSError."""
    directory = Path(model)
    if not directory.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.name == "config.json":
            digest.update(path.read_bytes())
        elif path.suffix in _WEIGHTS:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            with path.open("rb", buffering=0) as file:
                for index in range(_SAMPLES):
                    digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, size * index // _SAMPLES))
    return digest.hexdigest()[:32]


def adapter_fingerprint(adapter: str) -> str:
    """64 hex digits over adapter_config.json and all bytes of the weight files of a LoRA adapter; equal on every host
    with the same files. Empty where `adapter` is no directory (a name on a hub). Raises OSError."""
    directory = Path(adapter)
    if not directory.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.name == "adapter_config.json" or path.suffix in _WEIGHTS:
            with path.open("rb") as file:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
