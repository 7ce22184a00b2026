"""A small OpenAI client for the demo and the tests: output tokens by id, time of the first one, how it was routed."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from sglang_prfaas.errors import PeerError

ROUTE_HEADERS = ("route", "reason", "prefill", "decode", "room", "input-tokens", "uncached-tokens", "held-ms")


class Answer(Struct, kw_only=True):
    """What came back for one request."""

    status: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    routing: dict[str, str] = field(default_factory=dict)
    """The router's `x-prfaas-*` headers, without the prefix."""
    error: str = ""


def complete(
    base_url: str,
    model: str,
    prompt: str | list[dict[str, str]],
    max_tokens: int,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    **options: Any,
) -> Answer:
    """Greedy decoding, streamed: `/v1/completions` for a string, `/v1/chat/completions` for messages.

    Raises PeerError where the server cannot be reached or breaks off; an HTTP error comes back as an `Answer`."""
    chat = not isinstance(prompt, str)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **options,
    }
    if chat:
        body |= {"messages": prompt, "return_output_ids_in_sglext": True}
    else:
        body |= {"prompt": prompt, "return_token_ids": True}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    url = urllib.parse.urlsplit(base_url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=timeout_s)
    started = time.monotonic()
    try:
        send = {"content-type": "application/json", **(headers or {})}
        connection.request("POST", path, json.dumps(body).encode(), send)
        response = connection.getresponse()
        answer = Answer(status=response.status)
        for name in ROUTE_HEADERS:
            if (value := response.getheader(f"x-prfaas-{name}")) is not None:
                answer.routing[name] = value
        if response.status != 200:
            answer.error = response.read().decode(errors="replace")
            return answer
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = str(event["error"])
                break
            _take(answer, event, chat, time.monotonic() - started)
        answer.total_s = time.monotonic() - started
        return answer
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PeerError(f"{base_url}{path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _take(answer: Answer, event: dict[str, Any], chat: bool, elapsed_s: float) -> None:
    if usage := event.get("usage"):
        answer.prompt_tokens = int(usage["prompt_tokens"])
    if chat and (ids := (event.get("sglext") or {}).get("output_ids")):
        answer.token_ids = list(ids[0])
    for choice in event.get("choices", ()):
        text = (choice.get("delta") or {}).get("content") if chat else choice.get("text")
        answer.text += text or ""
        if not chat:
            answer.token_ids += choice.get("token_ids") or []
        if not answer.first_token_s and (text or choice.get("token_ids")):
            answer.first_token_s = elapsed_s
