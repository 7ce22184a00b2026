"""What a check finds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from msgspec import Struct

Exists = Callable[[str], bool]
"""Whether a path exists."""

Raw = tuple[str, str, bool]
"""Path of the key, text, whether it refuses the file."""

NOT_EXPANDED = "starts with '~', which is not expanded; write the whole path"


class Finding(Struct, frozen=True):
    """One result of a check.

    source: the file, empty where there is none. path: dotted path of the key. fatal: False for a warning.
    """

    source: str
    path: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.source}: {self.path}: {self.text}" if self.source else f"{self.path}: {self.text}"


def fatal(findings: Iterable[Finding]) -> list[str]:
    """The messages of those findings that refuse a configuration."""
    return [str(finding) for finding in findings if finding.fatal]


def findings_of(source: str, found: Iterable[Raw]) -> list[Finding]:
    """What was found, with the file it is of."""
    return [Finding(source, path, text, fatal) for path, text, fatal in found]


def repeated(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The names that come more than once, and how often each."""
    return ((name, count) for name, count in Counter(names).items() if count > 1)


def model_findings(path: str, model: str, exists: Exists) -> Iterator[Raw]:
    """What is wrong with the path of a model, at the key `path`."""
    if model.startswith("~"):
        yield path, f"{model!r} {NOT_EXPANDED}", True
    elif (os.path.isabs(model) or model.startswith(("./", "../")) or model.count("/") > 1) and not exists(model):
        text = (
            f"no such directory: {model!r}; write the path of the model, or owner/name of one on the Hugging Face hub"
        )
        yield path, text, True
