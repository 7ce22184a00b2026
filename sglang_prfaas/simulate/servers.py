"""The servers of a simulated site: prefill queues, decode batches, and the site's prefix cache."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque

from msgspec import Struct

from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import PrefillProfile
from sglang_prfaas.scheduler.types import ServerView
from sglang_prfaas.simulate.workload import BLOCK_TOKENS, Arrival

SHARED_FROM = 0.7
"""A server of both roles gets decode work once those that only decode are so full: the rest is room for bursts."""


class Job(Struct, eq=False, gc=False):
    """One request in the simulator, with the times of its steps in seconds."""

    number: int
    arrival: Arrival
    route: str = ""
    """Site of its prefill."""
    t_tokens: int = 0
    uncached_tokens: int = 0
    compute_tokens: int = 0
    """Tokens that its prefill server has to compute."""
    move_bytes: float = 0.0
    fetch_bytes: float = 0.0
    """KVCache of a prefix that the other site's cache lends."""
    work_s: float = 0.0
    """Prefill seconds on a whole instance."""
    decode: str = ""
    start_from_s: float = 0.0
    """When the request itself has reached its prefill server."""
    prefill_start_s: float = -1.0
    prefill_end_s: float = -1.0
    arrived_s: float = -1.0
    """When the KVCache was complete at decode."""
    first_token_s: float = -1.0
    retries: int = 0
    failed: bool = False
    """No server could take it."""
    broken: bool = False
    """Its decode server died after the first token."""


class PrefillServer:
    """One prefill instance: its queue in order of arrival, one prompt at a time.

    `speed`: the share of the instance's time that prefill has at the moment.
    """

    def __init__(self, view: ServerView, profile: PrefillProfile) -> None:
        self.view = view
        self.speed = 1.0
        self.queue: deque[Job] = deque()
        self.current: Job | None = None
        self.epoch = 0
        """Rises when the end of the current prefill changes, so that events of before mean nothing any more."""
        self.dead = False
        self.waiting_s = 0.0
        self.busy_s = 0.0
        self._left_s = 0.0
        self._seen_s = 0.0
        self._curve = profile.time_s

    @property
    def idle(self) -> bool:
        """Nothing in work and nothing waiting."""
        return self.current is None and not self.queue

    def push(self, job: Job) -> None:
        """Queue a job. Its work is counted in seconds of a whole instance."""
        job.work_s = self._curve.at(float(job.compute_tokens))
        self.queue.append(job)
        self.waiting_s += job.work_s
        self.view.inflight_requests += 1
        self.view.inflight_tokens += job.compute_tokens
        self.view.served += 1

    def start(self, now_s: float) -> Job:
        """Take the next job."""
        job = self.queue.popleft()
        self.waiting_s = self.waiting_s - job.work_s if self.queue else 0.0
        self.current, self._left_s, self._seen_s = job, job.work_s, now_s
        job.prefill_start_s = now_s
        return job

    def end_s(self) -> float:
        """When the current prefill ends, at the present speed."""
        return self._seen_s + self._left_s / self.speed

    def set_speed(self, speed: float, now_s: float) -> None:
        """A change of the share, in the middle of a prefill or not."""
        self._left_s = max(0.0, self._left_s - (now_s - self._seen_s) * self.speed)
        self._seen_s, self.speed = now_s, speed
        self.epoch += 1

    def finish(self, now_s: float) -> Job:
        """The current job is computed."""
        job = self.current
        assert job is not None
        job.prefill_end_s = now_s
        self.busy_s += job.work_s
        self.current, self._left_s = None, 0.0
        self.view.inflight_requests -= 1
        self.view.inflight_tokens -= job.compute_tokens
        return job

    def wait_s(self, now_s: float) -> float:
        """Seconds until the queue would be empty."""
        left_s = self._left_s - (now_s - self._seen_s) * self.speed if self.current is not None else 0.0
        return (self.waiting_s + max(0.0, left_s)) / self.speed

    def busy_until(self, now_s: float) -> float:
        """Seconds of a whole instance computed so far, the current job's part included."""
        if self.current is None:
            return self.busy_s
        return self.busy_s + self.current.work_s - max(0.0, self._left_s - (now_s - self._seen_s) * self.speed)

    def die(self) -> list[Job]:
        """Everything it had, to be prefilled elsewhere."""
        lost = [*([self.current] if self.current is not None else []), *self.queue]
        self.queue.clear()
        self.current, self.waiting_s, self._left_s = None, 0.0, 0.0
        self.epoch += 1
        self.view.alive, self.dead = False, True
        self.view.inflight_requests = self.view.inflight_tokens = 0
        return lost


class DecodeServer:
    """One decode instance: as many requests at once as the SLO allows, the others wait for a place.

    All running requests get a token a step, and a step takes what the profile says for the batch. `shares`: the prefill
    server that has the rest of the instance's time, which grows as places are free; steps then take as long as those
    of a full batch.
    """

    def __init__(
        self, view: ServerView, slots: int, slots_of_whole: int, step_s: Curve, shares: PrefillServer | None = None
    ) -> None:
        self.view = view
        self.slots = slots
        self.waiting: deque[Job] = deque()
        self.shares = shares
        self.epoch = 0
        self.dead = False
        self.batch_s = 0.0
        """Integral of the batch over time: what it did, in places times seconds."""
        self._whole = slots_of_whole
        self._step_s = [step_s.at(max(1, batch) if shares is None else slots_of_whole) for batch in range(slots + 1)]
        self._running: list[tuple[float, int, Job]] = []
        self._tokens = 0.0  # that a request which started with the server would have by now
        self._seen_s = 0.0
        if shares is not None:
            view.inflight_requests = round(SHARED_FROM * slots_of_whole)

    @property
    def free(self) -> int:
        return self.slots - len(self._running)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Nothing running and nothing waiting here or on the way."""
        return self.view.inflight_requests == 0

    def expect(self) -> None:
        """A request was routed here."""
        self.view.inflight_requests += 1
        self.view.served += 1

    def leave(self) -> None:
        """A request of it has ended or goes elsewhere."""
        self.view.inflight_requests -= 1

    def start(self, job: Job, now_s: float) -> None:
        """A request joins the batch."""
        self.advance(now_s)
        heapq.heappush(self._running, (self._tokens + job.arrival.output_tokens, job.number, job))
        self.epoch += 1

    def finish(self, now_s: float) -> Job:
        """The request with the fewest tokens left is done."""
        self.advance(now_s)
        self.epoch += 1
        return heapq.heappop(self._running)[2]

    def next_end_s(self) -> float:
        """When the next request is done, if none joins."""
        left = max(0.0, self._running[0][0] - self._tokens) if self._running else float("inf")
        return self._seen_s + left * self._step_s[len(self._running)]

    def advance(self, now_s: float) -> None:
        """Bring the batch to now."""
        seconds = now_s - self._seen_s
        self._tokens += seconds / self._step_s[len(self._running)]
        self.batch_s += seconds * len(self._running)
        self._seen_s = now_s

    def die(self, now_s: float) -> tuple[list[Job], list[Job]]:
        """The requests that had a first token, and those whose KVCache waited for a place, which have to `leave`."""
        self.advance(now_s)
        running, waiting = [job for _, _, job in self._running], list(self.waiting)
        self._running.clear()
        self.waiting.clear()
        self.epoch += 1
        self.view.alive, self.dead = False, True
        self.view.inflight_requests -= len(running)
        return running, waiting

    @property
    def prefill_share(self) -> float:
        """What decode leaves: a step takes time in proportion to its batch."""
        return 1 - len(self._running) / self._whole


class PrefixCache:
    """Which prompt blocks the servers of a site hold: least recently used go first, and of one prompt its end, without
    which its beginning is still a prefix. 0 blocks: no cache."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def cached_tokens(self, arrival: Arrival) -> int:
        """The cached prefix, always at least one token short of the prompt: the last one has to be computed."""
        hit = 0
        for block in arrival.blocks:
            if block not in self._blocks:
                break
            hit += 1
        return min(hit * BLOCK_TOKENS, arrival.input_tokens - 1)

    def insert(self, arrival: Arrival) -> None:
        if not self._capacity:
            return
        for block in reversed(arrival.blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
