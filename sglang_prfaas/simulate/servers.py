"""The servers of a simulated site: prefill queues, decode batches, and the site's prefix cache."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque

from msgspec import Struct

from sglang_prfaas.scheduler.profiles import PrefillProfile
from sglang_prfaas.scheduler.types import ServerView
from sglang_prfaas.simulate.workload import BLOCK_TOKENS, Arrival


class Job(Struct, eq=False, gc=False):
    """One request in the simulator, with the times of its steps in seconds."""

    number: int
    arrival: Arrival
    route: str = ""
    t_tokens: int = 0
    uncached_tokens: int = 0
    compute_tokens: int = 0
    """Tokens that its prefill server has to compute."""
    move_bytes: float = 0.0
    work_s: float = 0.0
    """Prefill seconds on a whole instance."""
    decode: str = ""
    prefill_start_s: float = -1.0
    prefill_end_s: float = -1.0
    arrived_s: float = -1.0
    """When the KVCache was complete at decode."""
    first_token_s: float = -1.0
    retries: int = 0
    failed: bool = False


class PrefillServer:
    """One prefill instance: its queue in order of virtual deadlines, one prompt at a time.

    The deadline of a job is its arrival plus `slack` times its prefill time; a slack of 0 is first come, first served.
    `speed`: the share of the instance's time that prefill has at the moment.
    """

    def __init__(self, view: ServerView, profile: PrefillProfile, slack: float) -> None:
        self.view = view
        self.speed = 1.0
        self.queue: list[tuple[float, int, Job]] = []
        self.current: Job | None = None
        self.epoch = 0
        """Rises when the end of the current prefill changes, so that events of before mean nothing any more."""
        self.waiting_s = 0.0
        self.busy_s = 0.0
        self._slack = slack
        self._left_s = 0.0
        self._seen_s = 0.0
        self._curve = profile.time_s

    def push(self, job: Job) -> None:
        """Queue a job. Its work is counted in seconds of a whole instance."""
        job.work_s = self._curve.at(float(job.compute_tokens))
        heapq.heappush(self.queue, (job.arrival.at_s + self._slack * job.work_s, job.number, job))
        self.waiting_s += job.work_s
        self.view.inflight_requests += 1
        self.view.inflight_tokens += job.compute_tokens
        self.view.served += 1

    def start(self, now_s: float) -> Job:
        """Take the next job."""
        job = heapq.heappop(self.queue)[2]
        self.waiting_s -= job.work_s
        self.current, self._left_s, self._seen_s = job, job.work_s, now_s
        job.prefill_start_s = now_s
        self.busy_s += job.work_s
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
        self.current, self._left_s = None, 0.0
        self.view.inflight_requests -= 1
        self.view.inflight_tokens -= job.compute_tokens
        return job

    def wait_s(self, now_s: float) -> float:
        """Seconds until the queue would be empty."""
        left_s = self._left_s - (now_s - self._seen_s) * self.speed if self.current is not None else 0.0
        return (self.waiting_s + max(0.0, left_s)) / self.speed

    def die(self) -> list[Job]:
        """Everything it had, to be prefilled elsewhere."""
        lost = [*([self.current] if self.current is not None else []), *(job for _, _, job in sorted(self.queue))]
        self.queue.clear()
        self.current, self.waiting_s, self._left_s = None, 0.0, 0.0
        self.epoch += 1
        self.view.alive = False
        self.view.inflight_requests = self.view.inflight_tokens = 0
        return lost


class DecodeServer:
    """One decode instance: as many requests at once as the SLO allows, the others wait for a place.

    `shares`: the prefill server that has the rest of the instance's time, which grows as places are free.
    """

    def __init__(self, view: ServerView, slots: int, slots_of_whole: int, shares: PrefillServer | None = None) -> None:
        self.view = view
        self.free = slots
        self.slots = slots
        self.waiting: deque[Job] = deque()
        self.shares = shares
        self.whole = slots_of_whole
        if shares is not None:
            view.inflight_requests = slots_of_whole  # it looks full until the instances that only decode are

    def expect(self) -> None:
        """A request was routed here."""
        self.view.inflight_requests += 1
        self.view.served += 1

    def leave(self) -> None:
        """A request of it has ended."""
        self.view.inflight_requests -= 1

    @property
    def prefill_share(self) -> float:
        """What decode leaves: a step takes time in proportion to its batch."""
        return 1 - (self.slots - self.free) / self.whole


class PrefixCache:
    """Which prompt blocks the servers of a site hold: least recently used go first. 0 blocks: no cache."""

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
        for block in arrival.blocks:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
