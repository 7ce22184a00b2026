"""What is known of a session's connections, and when it is lost: a state machine, with the times passed in.

    OPENING --all connections--> UP <--some--> PARTIAL <--none--> SUSPENDED      any of them --verdict--> LOST

A suspended session keeps its transfers while its connections are dialled again. It is lost once they have been gone
for `reconnect_timeout_s`, once its control connection has, and once the peer's process has ended: its ports refuse, or
it closed all data connections, or the control connection before there were any, and says nothing for
`closed_timeout_s`. A peer that says nothing for
`heartbeat_timeout_s` over connections that stand is `silent`: they are made anew, and it has `reconnect_timeout_s`
more.
"""

from __future__ import annotations

import enum
import random

from sglang_prfaas.config.schema import TransportConfig

NOTICED_AT = 0.9
"""Of the heartbeat timeout: silence that long is acted upon, so that it is by then, however late somebody looks."""
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
REFUSALS = 2
"""So many refused attempts in a row on one port mean that its process has ended."""


class Contact(enum.Enum):
    """How a session stands with its peer."""

    OPENING = "opening"
    UP = "up"
    PARTIAL = "partial"
    SUSPENDED = "suspended"
    LOST = "lost"


CONTACTS: dict[Contact, frozenset[Contact]] = {
    Contact.OPENING: frozenset({Contact.UP, Contact.LOST}),
    Contact.UP: frozenset({Contact.PARTIAL, Contact.SUSPENDED, Contact.LOST}),
    Contact.PARTIAL: frozenset({Contact.UP, Contact.SUSPENDED, Contact.LOST}),
    Contact.SUSPENDED: frozenset({Contact.UP, Contact.PARTIAL, Contact.LOST}),
    Contact.LOST: frozenset(),
}
"""Every change there is."""


def backoff_s(attempt: int, rng: random.Random) -> float:
    """Seconds before attempt `attempt` to dial again: none before the first, then doubling, with jitter."""
    if attempt == 0:
        return 0.0
    limit_s: float = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 10))
    return limit_s * rng.uniform(0.5, 1.0)


class Health:
    """The connections of one session. Not thread-safe."""

    def __init__(self, config: TransportConfig, connections: int, now_s: float) -> None:
        self._config = config
        self._all = connections
        self._up: set[int] = set()
        self.contact = Contact.OPENING
        self.reconnects = 0
        """Data connections made again after the first time."""
        self._dialled: set[int] = set()
        self._since_s = now_s
        """Since when the contact is what it is."""
        self._control_lost_s: float | None = None
        self._heard_s = now_s
        self._closed: set[int] = set()
        """Data connections that the peer closed."""
        self._emptied_s = now_s
        """When the last data connection went."""
        self._noticed_s = now_s - 1.0
        """What was heard last when its silence was noticed."""
        self._refusals: dict[int, int] = {}

    def expects(self, connections: int) -> None:
        """How many data connections there will be, where the peer has another number. Before the first stands."""
        self._all = connections

    def connected(self, index: int, now_s: float, *, heard: bool = True) -> None:
        """A data connection stands. heard: the peer's process has said so, not only its system."""
        self.reconnects += index in self._dialled
        self._dialled.add(index)
        self._up.add(index)
        self._closed.discard(index)
        self._refusals.pop(index, None)
        if heard or self.contact is Contact.OPENING:
            self.heard(now_s)
        self._look(now_s)

    def disconnected(self, index: int, now_s: float, *, closed: bool = False) -> None:
        """A data connection is gone. closed: the peer, or its system, has closed or reset it."""
        if closed:
            self._closed.add(index)
        if index in self._up:
            self._up.remove(index)
            self._emptied_s = now_s
        self._look(now_s)

    def refused(self, index: int) -> None:
        """A port of the peer refused. `index`: of the data connection, -1 for control."""
        self._refusals[index] = self._refusals.get(index, 0) + 1

    def control_lost(self, now_s: float) -> None:
        """The control connection is gone."""
        if self._control_lost_s is None:
            self._control_lost_s = now_s

    def control_found(self, now_s: float) -> None:
        """The control connection stands again."""
        self._control_lost_s = None
        self._refusals.pop(-1, None)
        self.heard(now_s)

    def heard(self, now_s: float) -> None:
        """The peer has said something."""
        self._heard_s = now_s

    @property
    def heard_s(self) -> float:
        return self._heard_s

    @property
    def control_stands(self) -> bool:
        """Whether nothing is known of a loss of the control connection."""
        return self._control_lost_s is None

    def lose(self) -> None:
        """The session is over."""
        self._enter(Contact.LOST, self._since_s)

    def verdict(self, now_s: float) -> str:
        """Why the session is lost, or an empty string."""
        config = self._config
        if self.contact is Contact.LOST:
            return ""
        closed = bool(self._dialled) and not self._up and self._closed >= self._dialled
        if closed and now_s - max(self._heard_s, self._emptied_s) > config.closed_timeout_s:
            return f"its process has ended: it closed all connections, and was gone for {config.closed_timeout_s:g} s"
        if self.contact is Contact.OPENING:
            lost_s = self._control_lost_s if not self._dialled else None
            if lost_s is not None and now_s - max(self._heard_s, lost_s) > config.closed_timeout_s:
                return (
                    f"its process has ended: it closed its connection, and was gone for {config.closed_timeout_s:g} s"
                )
            return ""
        gone = [index for index, count in self._refusals.items() if count >= REFUSALS]
        if gone and (self.contact is Contact.SUSPENDED or (-1 in gone and self._control_lost_s is not None)):
            return "its process has ended: nothing listens on its ports any more"
        limit_s = config.reconnect_timeout_s
        if self.contact is Contact.SUSPENDED and now_s - self._since_s > limit_s:
            return f"all data connections were lost, and none came back within {limit_s:g} s"
        if self._control_lost_s is not None and now_s - self._control_lost_s > limit_s:
            return f"it closed the control connection, and it did not come back within {limit_s:g} s"
        if now_s - self._heard_s > config.heartbeat_timeout_s + limit_s:
            return f"silent for {now_s - self._heard_s:.1f} s"
        return ""

    def silent(self, now_s: float) -> bool:
        """Whether the peer has fallen silent, and nothing was done about it: its data connections are to be made anew.
        True once for each silence."""
        standing = self.contact in (Contact.UP, Contact.PARTIAL)
        if not standing or self._noticed_s == self._heard_s:
            return False
        if now_s - self._heard_s <= NOTICED_AT * self._config.heartbeat_timeout_s:
            return False
        self._noticed_s = self._heard_s
        return True

    def _look(self, now_s: float) -> None:
        if self.contact is Contact.LOST:
            return
        if len(self._up) == self._all:
            self._enter(Contact.UP, now_s)
        elif self.contact is not Contact.OPENING:
            self._enter(Contact.PARTIAL if self._up else Contact.SUSPENDED, now_s)

    def _enter(self, contact: Contact, now_s: float) -> None:
        if contact is self.contact:
            return
        assert contact in CONTACTS[self.contact], f"{self.contact} to {contact}"
        self.contact = contact
        self._since_s = now_s
