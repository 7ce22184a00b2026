"""Messages, numbers and defaults in docs/protocol.md are those of the code."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from sglang_prfaas import transport
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport import framing, gateway_messages, messages

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "protocol.md"
TEXT = DOCUMENT.read_text()
MESSAGES = {
    kind.__name__: kind
    for union in (messages.ToPrefill, messages.ToDecode, messages.ToDirectory, messages.FromDirectory)
    for kind in get_args(union)
} | {kind.__name__: kind for kind in (gateway_messages.Offer, gateway_messages.Open, gateway_messages.Refused)}


def rows() -> list[list[str]]:
    """The cells of all tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:1] == "|"]


def documented() -> dict[str, list[str]]:
    """Every message that has a line of a table, with its cells."""
    return {cells[0].strip("`| "): cells for cells in rows() if cells[0].strip("`| ") in MESSAGES}


def test_every_message_has_its_line() -> None:
    assert set(documented()) == set(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_the_fields_of_a_message(name: str) -> None:
    cells = documented()[name]
    column = 2 if name in ("Offer", "Open", "Refused") else 1
    listed = [field for field in re.sub(r"\([^)]*\)", "", cells[column]).replace(" ", "").split(",") if field]
    fields = msgspec.structs.fields(MESSAGES[name])
    required = [field.name for field in fields if field.required]
    assert listed in (required, [field.name for field in fields])
    for field in fields:
        assert field.name in " ".join(cells), f"{name}.{field.name} is not explained"


@pytest.mark.parametrize("kind", [messages.RankInfo, messages.InnerRail])
def test_what_a_directory_tells_of_a_rank(kind: type[msgspec.Struct]) -> None:
    paragraph = TEXT[TEXT.index("A rank is `RankInfo`") :].partition("\n\n")[0]
    for field in msgspec.structs.fields(kind):
        assert field.name in paragraph


def constants() -> dict[str, set[float]]:
    """Every number that a module of the mover gives a name, by that name."""
    found: dict[str, set[float]] = {}
    for module in pkgutil.walk_packages(transport.__path__, "sglang_prfaas.transport."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.isupper() and isinstance(value, (int, float)):
                found.setdefault(name, set()).add(value)
    return found


CONSTANTS = constants()


def the(name: str, of: str = "") -> float:
    """The number of that name; `of`: of that module, where modules have different ones."""
    if of:
        return float(getattr(importlib.import_module(f"sglang_prfaas.transport.{of}"), name))
    (value,) = CONSTANTS[name]
    return float(value)


def numbers(text: str) -> list[float]:
    """Those in a text, `64 KiB` and `2^31 - 1` as what they are."""
    found: list[float] = []
    for power, minus, plain, unit in re.findall(r"2\^(\d+)( - 1)?|(\d[\d,]*(?:\.\d+)?)(?: ?(KiB|MiB))?", text):
        if power:
            found.append((1 << int(power)) - bool(minus))
        else:
            found.append(float(plain.replace(",", "")) * {"KiB": 1 << 10, "MiB": 1 << 20, "": 1}[unit])
    return found


CONFIG = TransportConfig()
SENTENCES: dict[str, list[float]] = {
    "| message to a prefill rank or a directory |": [the("MAX_REQUEST_BYTES")],
    "| message to a decode rank |": [the("MAX_MESSAGE_BYTES")],
    "| reason |": [the("MAX_REASON_CHARACTERS")],
    "| sessions of a prefill rank |": [the("MAX_SESSIONS")],
    "| data connections of all sessions |": [the("MAX_CONNECTIONS", "handshake")],
    "| sessions of one site, with keys |": [the("MAX_PEER_SESSIONS")],
    "| connections without a preface,": [the("MAX_PENDING_CONNECTIONS"), the("MAX_SOURCE_PENDING")],
    "| connections to a ZeroMQ port that have said nothing": [
        the("MAX_SILENT"),
        the("MAX_SOURCE_SILENT"),
        the("SILENT_S", "clients"),
        the("HANDSHAKE_MS") / 1000,
    ],
    "| connections to a ZeroMQ port |": [the("MAX_CLIENTS"), the("MAX_SOURCE_CLIENTS")],
    "| messages of one connection to a ZeroMQ port": [
        CONFIG.control_messages_per_s,
        the("BURST_S"),
        the("LAST_WORDS_S"),
        the("BAN_S"),
    ],
    "| requests open in one session |": [the("MAX_SESSION_TRANSFERS")],
    "| requests of one room |": [the("MAX_ROOM_TRANSFERS")],
    "| ends remembered that came before": [the("MAX_ABORTED")],
    "| messages of one peer waiting": [the("MAX_REQUESTS_HELD")],
    "| messages waiting in ZeroMQ for one peer": [the("MAX_MESSAGES_QUEUED")],
    "| numbered messages that a peer has not acknowledged |": [the("MAX_UNACKNOWLEDGED")],
    "| separate byte ranges remembered": [the("MAX_FRAGMENTS")],
    "| attention TP widths |": [the("MAX_WIDTH_RATIO")],
    "| tokens of a page, where page sizes differ |": [the("MAX_PAGE_TOKENS")],
    "| log lines about refused peers |": [the("LINES")],
    "after 1 s without progress": [the("RESEND_S")],
    "It comes after 8 MiB": [the("ACK_BYTES")],
    "after 16 attempts the transfer fails": [the("MAX_ATTEMPTS")],
    "doubling up to 2 s": [the("BACKOFF_MAX_S")],
    "then after 0.05 s": [the("BACKOFF_FIRST_S")],
    "every 10 s, and every 0.25 s until": [the("RENEW_S", "registration"), the("RETRY_S", "registration")],
    "last messages get 1 s": [the("FAREWELL_MS") / 1000],
    "protect at most 2^24 records of at most 16 KiB": [the("MAX_TLS_RECORDS"), the("TLS_RECORD_BYTES")],
    "holds at most 1024 connections that wait, 1024 without a preface, and 8192 relayed": [
        the("MAX_WAITING"),
        the("MAX_WAITING"),
        the("MAX_RELAYED"),
    ],
    "at most 256 at a time": [the("MAX_DIALLING")],
    "has not\noffered itself for 4 s": [the("SILENT_S", "gateway")],
    "does not listen on that port for 1 s": [the("REFUSE_S")],
    "good for one connection and for 10 s": [the("JOIN_TIMEOUT_S")],
    "at least 9 bytes": [the("LEAST_FRAME_BYTES")],
    "largest power of two up to 128": [the("LARGEST_WIDTH")],
    "is below 16, `fp8`": [the("SMALLEST_WIDTH")],
}
"""What the document says, and the numbers of the code that it has to say; of a line of a table all that stand there."""


@pytest.mark.parametrize("says", SENTENCES)
def test_a_number(says: str) -> None:
    where = says
    if says.startswith("| "):
        (line,) = [line for line in TEXT.splitlines() if line.startswith(says)]
        where = line.partition(" | ")[2]
    else:
        assert says in TEXT
    said = numbers(where)
    missing = [number for number in SENTENCES[says] if number not in said]
    assert not missing, where


def test_versions_and_sizes() -> None:
    assert f"Protocol version {messages.PROTOCOL_VERSION}, data version {framing.DATA_VERSION}." in TEXT
    assert f"| `Offer` | prefill site | version ({gateway_messages.VERSION}), site |" in TEXT
    for what, size in (
        ("preface", framing.PREFACE.size),
        ("renewal", framing.HEADER_BYTES),
        ("receipt", framing.RECEIPT.size),
        ("chunk", framing.HEADER_BYTES),
    ):
        assert f"\n{what}, {size} bytes" in TEXT
    for magic in (framing.PREFACE_MAGIC, framing.CHUNK_MAGIC, framing.ENCODED_MAGIC, framing.RENEWAL[:4]):
        assert f'"{magic.decode()}"' in TEXT
    for magic in (framing.ACK_MAGIC, framing.AGAIN_MAGIC, gateway_messages.PREFACE_MAGIC):
        assert f'"{magic.decode()}' in TEXT


def test_every_timeout_and_its_default() -> None:
    table = TEXT[TEXT.index("## Timeouts") : TEXT.index("## Bounds")]
    listed = dict(re.findall(r"^\| `(\w+_s)` \| ([\d.]+) \|", table, re.M))
    defaults = {
        field.name: field.default
        for field in msgspec.structs.fields(TransportConfig)
        if field.name.endswith(("_timeout_s", "heartbeat_interval_s"))
    }
    assert {key: float(value) for key, value in listed.items()} == defaults
