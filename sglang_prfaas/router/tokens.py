"""Token counts of prompts: estimated from bytes far from the threshold, exact near it.

An exact count renders the chat template and encodes in a worker thread (the encoder releases the interpreter lock).
Each one calibrates bytes per token, on which the estimates rest.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from msgspec import Raw, Struct

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.router.body import ParsedBody, is_given

_MESSAGE_OVERHEAD_TOKENS = 8
_CALIBRATION_WEIGHT = 0.1
_CALIBRATION_TEXT = (
    "The service takes long prompts, computes their attention in another datacenter and decodes at home.\n"
    "def transfer(block: bytes, offset: int = 0) -> int:\n    return len(block) - offset  # 4,096 bytes or fewer\n"
)

log = logging.getLogger(__name__)


class TokenCount(Struct, frozen=True):
    """Prompt tokens of one request: of its longest prompt, of all its prompts, and whether they were counted."""

    longest: int
    total: int
    exact: bool


class TokenCounter:
    """Counts tokens as SGLang will, with the model's tokenizer. `load` must have run."""

    def __init__(self, model_path: str, *, trust_remote_code: bool = False, workers: int = 2) -> None:
        self._model_path = model_path
        self._trust_remote_code = trust_remote_code
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="count")
        self._tokenizer: Any = None
        self._fast: Any = None
        self.bytes_per_token = 4.0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def load(self) -> None:
        """Load the tokenizer (seconds: run it off the event loop). Raises ConfigError where there is none."""
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._model_path, trust_remote_code=self._trust_remote_code)
        except (OSError, ValueError, ImportError, KeyError) as exc:
            raise ConfigError(
                f"router.model: no tokenizer could be loaded from {self._model_path!r}: {exc}. Give the path of the "
                "model that the servers serve (set router.trust_remote_code = true if its tokenizer comes with code)."
            ) from exc
        self.use(tokenizer)

    def use(self, tokenizer: Any) -> None:
        """Count with this tokenizer (Hugging Face's interface)."""
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        tokens = self._encode(_CALIBRATION_TEXT, add_special_tokens=False)
        self.bytes_per_token = max(1.0, len(_CALIBRATION_TEXT) / max(1, tokens))

    async def count(self, body: ParsedBody, low_tokens: float, high_tokens: float) -> TokenCount:
        """Count a request's prompt tokens; exactly where an estimate lies within [low_tokens, high_tokens]."""
        ids = count_ids(body)
        if ids is not None:
            return ids
        estimate = self.estimate(body)
        if not low_tokens <= estimate.longest <= high_tokens or body.prompt is None:
            return estimate
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.count_exactly, body)

    async def token_ids(self, body: ParsedBody) -> TokenCount | None:
        """Write the ids of a request's longest prompt into the body, and count; None where they cannot be had."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._find_ids, body)

    def _find_ids(self, body: ParsedBody) -> TokenCount | None:
        if body.prompt is None:
            return None
        try:
            if body.endpoint == "chat":
                text, whole = self._render_chat(body)
                prompts: list[Any] = [text] if whole else []
            else:
                prompt = msgspec.json.decode(body.prompt)
                prompts = prompt if body.batch is not None else [prompt]
            special = body.endpoint != "chat"
            found = [self._ids(prompt, special) for prompt in prompts]
        except Exception as exc:  # noqa: BLE001 - templates are programs of the model's; SGLang will judge the request
            log.info("a prompt could not be tokenised (%s: %s)", type(exc).__name__, exc)
            return None
        if not found:
            return None
        body.token_ids = max(found, key=len)
        total = sum(map(len, found))
        self._calibrate(memoryview(body.prompt).nbytes, total if isinstance(prompts[0], str) else 0)
        return TokenCount(len(body.token_ids), total, True)

    def _ids(self, prompt: Any, special: bool) -> list[int]:
        if isinstance(prompt, str):
            if self._fast is not None:
                (encoding,) = self._fast.encode_batch_fast([prompt], add_special_tokens=special)
                return list(encoding.ids)
            return list(self._tokenizer.encode(prompt, add_special_tokens=special))
        return msgspec.convert(prompt, list[int])

    def _calibrate(self, size_bytes: int, tokens: int) -> None:
        if tokens >= 64:
            ratio = size_bytes / tokens
            self.bytes_per_token += _CALIBRATION_WEIGHT * (max(1.0, ratio) - self.bytes_per_token)

    def estimate(self, body: ParsedBody) -> TokenCount:
        """Tokens from the size of the prompt's JSON."""
        if body.prompt is None:
            return TokenCount(0, 0, False)
        if body.batch is not None:
            sizes = [self._estimate_raw(item) for item in msgspec.json.decode(body.prompt, type=list[Raw])]
            return TokenCount(max(sizes), sum(sizes), False)
        tokens = self._estimate_raw(body.prompt)
        if body.endpoint == "chat":
            tokens += _MESSAGE_OVERHEAD_TOKENS
            if is_given(body.fields.tools):
                tokens += self._estimate_raw(body.fields.tools)
        return TokenCount(tokens, tokens, False)

    def _estimate_raw(self, raw: Raw) -> int:
        data = bytes(raw)
        size = len(data) - 3 * data.count(b"\\u")  # \uXXXX stands for about three bytes of UTF-8
        if b'"image_url"' in data or b'"input_audio"' in data or b'"video_url"' in data:
            size = sum(len(text) for text in _texts(msgspec.json.decode(data)))
        return int(size / self.bytes_per_token)

    def count_exactly(self, body: ParsedBody) -> TokenCount:
        """Encode the prompt. Falls back on the estimate for what the template or tokenizer does not take."""
        assert body.prompt is not None
        try:
            if body.endpoint == "chat":
                text, exact = self._render_chat(body)
                texts, special = [text], False
            else:
                prompt = msgspec.json.decode(body.prompt)
                texts, special = (prompt if isinstance(prompt, list) else [prompt]), True
                exact = all(isinstance(text, str) for text in texts)
            counts = [self._encode(text, add_special_tokens=special) for text in texts if isinstance(text, str)]
        except Exception as exc:  # noqa: BLE001 - templates are programs of the model's; SGLang will judge the request
            log.info("a prompt could not be counted exactly (%s: %s)", type(exc).__name__, exc)
            return self.estimate(body)
        total = sum(counts)
        self._calibrate(memoryview(body.prompt).nbytes, total if exact else 0)
        return TokenCount(max(counts, default=0), total, exact)

    def _render_chat(self, body: ParsedBody) -> tuple[str, bool]:
        """(text of the rendered chat template, whether it holds the whole prompt)."""
        assert body.prompt is not None
        messages: Any = msgspec.json.decode(body.prompt)
        tools = msgspec.json.decode(body.fields.tools) if is_given(body.fields.tools) else None
        kwargs: dict[str, Any] = {}
        if is_given(body.fields.chat_template_kwargs):
            kwargs = msgspec.json.decode(body.fields.chat_template_kwargs, type=dict[str, Any])
        plain, exact = _plain_messages(messages)
        if getattr(self._tokenizer, "chat_template", None) is None:
            return "\n".join(_texts(messages)), False
        assistant_prefix = ""
        if body.fields.continue_final_message and plain and plain[-1].get("role") == "assistant":
            assistant_prefix = str(plain.pop().get("content") or "")
        rendered = self._tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=True, tools=tools, **kwargs
        )
        return str(rendered) + assistant_prefix, exact

    def _encode(self, text: str, *, add_special_tokens: bool) -> int:
        if self._fast is not None:  # encode_batch releases the interpreter lock, encode does not
            (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return len(encoding.ids)
        return len(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))


def count_ids(body: ParsedBody) -> TokenCount | None:
    """The count of a prompt that is given as token ids or embeddings; None for texts."""
    if body.prompt is None or body.endpoint == "chat":
        return None
    data = bytes(body.prompt)
    if body.batch is None:
        if data.lstrip()[:1] != b"[":
            return None
        rows = data.count(b"[") - 1 if b"[" in data[1:] else data.count(b",") + (data.strip(b"[] \t\r\n") != b"")
        return TokenCount(rows, rows, True)
    items: list[Any] = msgspec.json.decode(data)
    if not all(isinstance(item, list) for item in items):
        return None
    lengths = [len(item) for item in items]
    return TokenCount(max(lengths), sum(lengths), True)


def _plain_messages(messages: Any) -> tuple[list[dict[str, Any]], bool]:
    """Messages whose content parts are joined to one text; False when parts other than text were left out."""
    exact = True
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text", "") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            exact &= len(texts) == len(content)
            message = {**message, "content": " ".join(texts)}
        elif content is None:
            message = {**message, "content": ""}
        plain.append(message)
    return plain, exact


def _texts(messages: Any) -> list[str]:
    """All texts of a message list, without media."""
    found: list[str] = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            found.append(content)
        elif isinstance(content, list):
            found.extend(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return found
