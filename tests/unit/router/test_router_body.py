"""Bodies: batches, bootstrap fields, and that nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.http import HttpError
from sglang_prfaas.router.body import Endpoint, new_rooms, parse_body

NAMES = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text() | st.sampled_from([*NAMES, "stream", "temperature", "lora_path"]), json_values)


def inject(raw: bytes, endpoint: Endpoint = "completions") -> bytes:
    body = parse_body(endpoint, raw)
    return body.with_bootstrap("10.0.0.1", 8998, [7] * (body.batch or 1))


@given(objects, st.booleans(), st.sampled_from(["", " ", "\n\t "]), st.sampled_from([None, 1]))
def test_only_bootstrap_fields_change(value: dict[str, Any], ascii_only: bool, space: str, indent: int | None) -> None:
    raw = (space + json.dumps(value, ensure_ascii=ascii_only, indent=indent) + space).encode()
    sent = inject(raw)
    got = json.loads(sent)
    assert [got.pop(name) for name in NAMES] == ["10.0.0.1", 8998, 7]
    assert got == {key: item for key, item in value.items() if key not in NAMES}
    if not any(name in value for name in NAMES):
        assert sent.startswith(raw.rstrip()[:-1])


def test_numbers_and_duplicates_stay_as_they_are() -> None:
    sent = inject(b'{"seed": 123456789012345678901234567890, "t": 1.0E-05, "t": 2.50, "s": "\\u00e9\\/"}')
    assert sent.startswith(b'{"seed": 123456789012345678901234567890, "t": 1.0E-05, "t": 2.50, "s": "\\u00e9\\/"')


def test_a_clients_bootstrap_fields_appear_once() -> None:
    sent = inject(b'{"bootstrap_room": 1, "prompt": "a", "bootstrap_host": "x", "bootstrap_room": 2, "f": 1.50}')
    assert sent.count(b"bootstrap_room") == sent.count(b"bootstrap_host") == 1
    assert b"1.50" in sent
    assert json.loads(sent)["bootstrap_room"] == 7


@pytest.mark.parametrize(
    ("endpoint", "raw", "batch"),
    [
        ("chat", b'{"messages": [{"role": "user"}]}', None),
        ("completions", b'{"prompt": "a"}', None),
        ("completions", b'{"prompt": ["a"]}', 1),
        ("completions", b'{"prompt": [ "a", "b" ]}', 2),
        ("completions", b'{"prompt": [1, 2]}', None),
        ("completions", b'{"prompt": [[1, 2], [3]]}', 2),
        ("completions", b'{"prompt": []}', None),
        ("completions", b'{"prompt": null}', None),
        ("generate", b'{"text": ["a", "b", "c"]}', 3),
        ("generate", b'{"text": null, "input_ids": [[1], [2]]}', 2),
        ("generate", b'{"input_ids": [1]}', None),
        ("generate", b'{"input_embeds": [[0.5, 1e-3], [0.25, 2.0]]}', None),
        ("generate", b'{"input_embeds": [[[0.5]], [[0.25]]]}', 2),
        ("generate", b"{}", None),
    ],
)
def test_batches(endpoint: Endpoint, raw: bytes, batch: int | None) -> None:
    body = parse_body(endpoint, raw)
    assert body.batch == batch
    rooms = new_rooms(body)
    assert len(rooms) == (batch or 1)
    sent = json.loads(body.with_bootstrap("h", 1, rooms))
    assert sent["bootstrap_room"] == (rooms[0] if batch is None else rooms)
    assert sent["bootstrap_host"] == ("h" if batch is None else ["h"] * batch)


def test_rooms_are_63_bits_and_fresh() -> None:
    body = parse_body("chat", b"{}")
    rooms = {new_rooms(body)[0] for _ in range(1000)}
    assert len(rooms) == 1000
    assert all(0 <= room < (1 << 63) - 1000 for room in rooms)
    assert max(rooms) > 1 << 61


@pytest.mark.parametrize(
    "raw", [b"", b" ", b"null", b"[]", b"3", b'{"a"', b"{'a': 1}", b'{"a": NaN}', b"[" * 9999, b'{"a": "\xff\xfe"}']
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse_body("chat", raw)
    assert caught.value.status == 400


def test_which_requests_need_prefills_logprobs() -> None:
    assert parse_body("generate", b'{"return_logprob": true}').merges_logprobs
    assert parse_body("generate", b'{"return_logprob": [false, true]}').merges_logprobs
    assert not parse_body("generate", b'{"return_logprob": false}').merges_logprobs
    assert not parse_body("chat", b'{"return_logprob": true}').merges_logprobs
