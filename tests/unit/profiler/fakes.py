"""Fake SGLang servers whose prefill and decode take the time that a law says. Real sockets, in a thread."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_prfaas.http import Framing, HttpServer, Request, Response
from sglang_prfaas.site.threaded import LoopThread
from sglang_prfaas.transport import transfer_log
from sglang_prfaas.transport.transfer_log import TransferRecord

VOCABULARY = 1000
BYTES_PER_TOKEN, STATE_BYTES = 1000, 50_000


class Fake:
    """One server. Everything that tests change is an attribute."""

    def __init__(self, mode: str, rooms: dict[int, asyncio.Event]) -> None:
        self.mode = mode
        self.rooms = rooms
        self.prefill_s: Callable[[int], float] = lambda tokens: 0.0
        self.step_s: Callable[[int], float] = lambda batch: 0.01
        self.own_clock = False
        """Whether answers carry the server's own times, and no time really passes."""
        self.max_running, self.max_tokens, self.refuse_above = 8, 100_000, 100_000
        self.architecture, self.model_name, self.model_path = "KimiLinearForCausalLM", "tiny", "/models/tiny"
        self.cached_tokens = 0
        self.foreign_requests = 0
        self.log = ""
        self.transfer_bytes_per_s = 1e9
        self.prompts: list[list[int]] = []
        self.running: list[asyncio.Queue[bool]] = []
        self.most_running = 0
        self.url = ""
        self._slots: asyncio.Semaphore | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._server: HttpServer

    async def listen(self) -> None:
        self._server = HttpServer(self._handle)
        self.url = f"http://127.0.0.1:{await self._server.start('127.0.0.1', 0)}"

    async def close(self) -> None:
        await self._server.close()

    async def _handle(self, request: Request, response: Response) -> None:
        if request.path == "/model_info":
            answer: dict[str, Any] = {
                "model_path": self.model_path,
                "served_model_name": self.model_name,
                "disaggregation_mode": "null" if self.mode == "plain" else self.mode,
                "architectures": [self.architecture],
            }
            response.send(200, json.dumps(answer).encode())
        elif request.path == "/v1/loads":
            load = {
                "num_running_reqs": len(self.running) + self.foreign_requests,
                "num_waiting_reqs": 0,
                "max_total_num_tokens": self.max_tokens,
                "max_running_requests": self.max_running,
                "disaggregation": {"mode": self.mode, "decode_prealloc_queue_reqs": 0},
            }
            response.send(200, json.dumps({"version": "0.5.23", "num_accelerators": 4, "loads": [load]}).encode())
        elif request.path == "/server_info":
            response.send(200, b'{"disaggregation_bootstrap_port": 8998}')
        elif request.path == "/generate":
            await self._generate(json.loads(request.body), response)
        else:
            response.send(404, b"{}")

    async def _generate(self, body: dict[str, Any], response: Response) -> None:
        ids = body["input_ids"]
        self.prompts.append(ids)
        if len(ids) > self.refuse_above:
            message = f"The input ({len(ids)} tokens) is longer than the model's context length"
            response.send(400, json.dumps({"error": {"message": message}}).encode())
            return
        law_s = self.prefill_s(len(ids))
        if self.mode != "decode" and not self.own_clock:
            await asyncio.sleep(law_s)
        if self.mode != "plain" and body["bootstrap_host"] != "2.2.2.2":
            room = self.rooms.setdefault(body["bootstrap_room"], asyncio.Event())
            if self.mode == "prefill":
                room.set()
            else:
                await room.wait()
                self._note_transfer(body["bootstrap_room"], len(ids))
        if body["stream"]:
            await self._stream(body["sampling_params"]["max_new_tokens"], response)
            return
        meta: dict[str, Any] = {"cached_tokens": self.cached_tokens, "finish_reason": {"type": "length"}}
        if self.own_clock:
            meta |= {"forward_entry_time": 1000.0, "prefill_finished_time": 1000.0 + law_s, "e2e_latency": 99.0}
        response.send(200, json.dumps({"meta_info": meta}).encode())

    async def _stream(self, tokens: int, response: Response) -> None:
        response.start(200, [(b"content-type", b"text/event-stream")], Framing.CHUNKED)
        self._slots = self._slots or asyncio.Semaphore(self.max_running)
        async with self._slots:
            ticks: asyncio.Queue[bool] = asyncio.Queue()
            self.running.append(ticks)
            self.most_running = max(self.most_running, len(self.running))
            if self._ticking is None:
                self._ticking = asyncio.create_task(self._tick())
            try:
                for count in range(1, tokens + 1):
                    await ticks.get()
                    response.write(b'data: {"text": "x", "meta_info": {"completion_tokens": %d}}\n\n' % count)
            finally:
                self.running.remove(ticks)
        response.write(b"data: [DONE]\n\n")
        response.end()

    async def _tick(self) -> None:
        """One decode step after the other, of all that run."""
        while self.running:
            await asyncio.sleep(self.step_s(len(self.running)))
            for ticks in self.running:
                ticks.put_nowait(True)
        self._ticking = None

    def _note_transfer(self, room: int, tokens: int) -> None:
        if not self.log:
            return
        size = BYTES_PER_TOKEN * tokens + STATE_BYTES
        for rank in range(2):
            record = TransferRecord(
                role="decode",
                room=room,
                rank=rank,
                status="done",
                unix_time_s=time.time(),
                bytes=size // 2,
                transfer_s=size / self.transfer_bytes_per_s,
            )
            transfer_log.append(self.log, record)


@contextmanager
def serving(*modes: str) -> Iterator[list[Fake]]:
    """Fake servers of these modes; what they share is their rooms."""
    rooms: dict[int, asyncio.Event] = {}
    fakes = [Fake(mode, rooms) for mode in modes]
    thread = LoopThread()
    try:
        for fake in fakes:
            thread.run(fake.listen())
        yield fakes
    finally:
        for fake in fakes:
            thread.run(fake.close())
        thread.close()


def write_config(folder: Path, **changes: Any) -> Path:
    """A config.json whose layout is what the fakes move: dense, 1,000 bytes a token, but no state."""
    config = {
        "num_hidden_layers": 5,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 50,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 65536,
        **changes,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path
