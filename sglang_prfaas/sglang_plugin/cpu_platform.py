"""Entry point `sglang.srt.platforms`."""


def activate() -> str | None:
    return None
