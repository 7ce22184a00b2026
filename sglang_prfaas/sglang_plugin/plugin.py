"""Entry point `sglang.srt.plugins`: filled in by the transfer backend."""


def register() -> None:
    """Called by SGLang in every process."""
