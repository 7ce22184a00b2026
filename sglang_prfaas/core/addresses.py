"""Host and port in one text. Pure: nothing is looked up."""

from __future__ import annotations


def bracketed(host: str) -> str:
    """A host as it stands before a colon and a port: an IPv6 address gets its brackets (RFC 3986, 3.2.2), once."""
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def authority(host: str, port: int) -> str:
    """`10.2.0.21:8000`, `[fd00::21]:8000`: for URLs, ZeroMQ endpoints and messages."""
    return f"{bracketed(host)}:{port}"


def base_url(scheme: str, host: str, port: int) -> str:
    """`http://[fd00::21]:8000`."""
    return f"{scheme}://{authority(host, port)}"
