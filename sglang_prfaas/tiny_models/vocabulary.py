"""The token ids of the tiny models' vocabulary, known without loading a tokenizer."""

from __future__ import annotations

from sglang_prfaas.tiny_models.configs import BOS, EOS, PAD

SPECIAL_TOKENS = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<|user|>", 4: "<|assistant|>", 5: "<|system|>"}

_LETTERS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level BPE: a printable letter for each of the 256 bytes (GPT-2's table)."""
    others = [byte for byte in range(256) if byte not in _LETTERS]
    table = {chr(byte): byte for byte in _LETTERS}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


def silent_tokens() -> list[int]:
    """Ids that the tiny models never choose: special tokens and single bytes that are no printable ASCII.

    Answers then run to their token limit, and every token is text of its own: nothing waits for the rest of a letter.
    """
    table = byte_of_letter()
    first = len(SPECIAL_TOKENS)
    silent = [n for n, letter in enumerate(sorted(table), start=first) if not 0x20 <= table[letter] < 0x7F]
    return [*SPECIAL_TOKENS, *silent]
