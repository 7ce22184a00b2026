"""Ids of LoRA adapters that stand for what is in their files.

SGLang seeds the hashes of a prompt's pages with the adapter's id, and makes that of an adapter in `--lora-paths` from
its name and path. A cache that outlives the server, or that other servers read, needs more: an adapter trained anew
under the same path must not find what the old one computed, and the same adapter under another path should.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_prfaas.store.fingerprint import adapter_fingerprint


def deterministic_id(original: Callable[[str, str], str], lora_name: str, lora_path: str) -> str:
    """AROUND `LoRARef.deterministic_id`: the id of the adapter's name and files; SGLang's own, of name and path, where
    the path is no directory here. Raises OSError for files that cannot be read."""
    fingerprint = adapter_fingerprint(lora_path)
    return original(lora_name, f"sha256:{fingerprint}" if fingerprint else lora_path)
