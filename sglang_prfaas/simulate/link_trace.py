"""A link's capacity over time, from a file."""

from __future__ import annotations

from pathlib import Path

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.simulate.cluster import Fault


def load_link_trace(path: str | Path) -> list[Fault]:
    """Lines of seconds and Gbps, with blanks or a comma between; # begins a comment. Each capacity holds until
    the next one.

    Raises ConfigError with the line that is wrong.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    found: list[Fault] = []
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].replace(",", " ").split()):
            continue
        try:
            at_s, gbps = (float(part) for part in text)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: expected seconds and Gbps, got {line!r}") from error
        if at_s < 0 or gbps < 0 or (found and at_s <= found[-1].at_s):
            raise ConfigError(f"{path}, line {number}: times must rise, and nothing be negative, got {line!r}")
        found.append(Fault(at_s, "link_gbps", gbps))
    if not found:
        raise ConfigError(f"{path}: holds no line of seconds and Gbps")
    return found
