"""A link between two sites as a fluid: flows share its capacity fairly, none sends what prefill has not produced yet.

Layer-wise prefill pipelining: a flow's full-attention KV becomes ready evenly over the prefill, its recurrent state
when the prefill ends. What is left to send then is the exposed part of the transfer.

Loss slows TCP down: a connection that loses a share p of its segments gets at most MSS / RTT * sqrt(3 / (2 p)) (Mathis
et al., 1997, for congestion control of Reno's kind), and the lost bytes go twice.
"""

from __future__ import annotations

import math

from sglang_prfaas.core.units import bytes_per_s_to_gbps, gbps_to_bytes_per_s

_EPSILON_BYTES = 64.0
_MSS_BYTES = 1448.0


def lossy_gbps(gbps: float, loss: float, rtt_s: float, connections: int) -> float:
    """What TCP gets through a link of `gbps` that loses a share of its segments."""
    if loss <= 0:
        return gbps
    left = gbps * (1 - loss)
    if rtt_s <= 0:
        return left
    each = _MSS_BYTES / rtt_s * math.sqrt(3 / (2 * loss))
    return min(left, bytes_per_s_to_gbps(connections * each))


class Flow:
    """One request's KVCache on its way."""

    __slots__ = ("end_s", "key", "rate", "ready", "ready_rate", "sent", "state_bytes", "total_bytes")

    def __init__(self, key: int, total_bytes: float, state_bytes: float, prefill_s: float, now_s: float) -> None:
        self.key = key
        self.total_bytes = total_bytes
        self.state_bytes = min(state_bytes, total_bytes)
        self.end_s = now_s + prefill_s
        self.ready = self.sent = self.rate = 0.0
        self.ready_rate = (total_bytes - self.state_bytes) / prefill_s

    @property
    def backlog(self) -> float:
        return self.ready - self.sent


class SharedLink:
    """Capacity shared by flows, max-min fair. Advanced from event to event; never sleeps or looks at a clock."""

    def __init__(self, gbps: float, rtt_s: float = 0.0, connections: int = 64) -> None:
        """`rtt_s` and `connections` count where segments are lost."""
        self._raw_gbps, self._loss, self._rtt_s, self._connections = gbps, 0.0, rtt_s, connections
        self._bytes_per_s = gbps_to_bytes_per_s(gbps)
        self._flows: dict[int, Flow] = {}
        self._now_s = 0.0
        self.sent_bytes = 0.0
        self.gbps = gbps

    def set_capacity(self, gbps: float, now_s: float) -> None:
        """A change of capacity; 0 is a cut."""
        self.advance(now_s)
        self._raw_gbps = gbps
        self._changed()

    def set_loss(self, loss: float, now_s: float) -> None:
        """A change of the share of segments that are lost."""
        self.advance(now_s)
        self._loss = loss
        self._changed()

    def _changed(self) -> None:
        self.gbps = lossy_gbps(self._raw_gbps, self._loss, self._rtt_s, self._connections)
        self._bytes_per_s = gbps_to_bytes_per_s(self.gbps)
        self._share()

    def start(self, key: int, total_bytes: float, state_bytes: float, prefill_s: float, now_s: float) -> None:
        """A prefill of `prefill_s` begins to produce."""
        self.advance(now_s)
        self._flows[key] = Flow(key, total_bytes, state_bytes, prefill_s, now_s)
        self._share()

    def drop(self, key: int, now_s: float) -> None:
        """Forget a flow whose prefill died."""
        self.advance(now_s)
        if self._flows.pop(key, None) is not None:
            self._share()

    def backlog_bytes(self) -> float:
        """Produced and not yet sent, as of the last advance."""
        return sum(flow.backlog for flow in self._flows.values())

    def outstanding_bytes(self) -> float:
        """Not yet sent of everything that has begun, as of the last advance."""
        return sum(flow.total_bytes - flow.sent for flow in self._flows.values())

    def advance(self, now_s: float) -> list[int]:
        """Move to `now_s`, at most `next_event_s`. Returns the flows that are all sent, and forgets them."""
        dt = now_s - self._now_s
        self._now_s = now_s
        if not self._flows:
            return []
        finished: list[int] = []
        changed = False
        for flow in self._flows.values():
            step = flow.rate * dt
            flow.sent += step
            self.sent_bytes += step
            if flow.end_s > now_s:
                flow.ready += flow.ready_rate * dt
            elif flow.ready_rate > 0 or flow.ready < flow.total_bytes:
                flow.ready, flow.ready_rate, changed = flow.total_bytes, 0.0, True
            if flow.end_s <= now_s and flow.total_bytes - flow.sent < _EPSILON_BYTES:
                finished.append(flow.key)
        for key in finished:
            del self._flows[key]
        if finished or changed or dt > 0:
            self._share()
        return finished

    def next_event_s(self) -> float:
        """When rates change next or a flow is done; infinite for an idle link."""
        found = float("inf")
        for flow in self._flows.values():
            if flow.ready_rate > 0 or flow.end_s > self._now_s:
                found = min(found, flow.end_s)
                if flow.backlog > _EPSILON_BYTES and flow.rate > flow.ready_rate:
                    found = min(found, self._now_s + flow.backlog / (flow.rate - flow.ready_rate))
            elif flow.rate > 0:
                found = min(found, self._now_s + max(0.0, flow.total_bytes - flow.sent) / flow.rate)
        return max(found, self._now_s)

    def _share(self) -> None:
        """Max-min fair rates: flows without backlog take at most what they produce, the others share the rest."""
        left, waiting = self._bytes_per_s, len(self._flows)
        keeping_up: list[Flow] = []
        behind: list[Flow] = []
        for flow in self._flows.values():
            (behind if flow.backlog > _EPSILON_BYTES else keeping_up).append(flow)
        for flow in sorted(keeping_up, key=lambda flow: flow.ready_rate):
            flow.rate = min(flow.ready_rate, left / waiting)
            left -= flow.rate
            waiting -= 1
        for flow in behind:
            flow.rate = left / waiting
