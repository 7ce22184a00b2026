"""What an agent reports, and to whom: numbers its reports, and answers every command once."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable

from sglang_prfaas.monitor.reports import Answer, Command, LinkLoad, Report, ServerLoad, SiteLoads

_ANSWERS_KEPT = 1024

Execute = Callable[[Command], "asyncio.Task[tuple[bool, str]]"]


class Reporter:
    """Between the agent and its report server. Belongs to one event loop."""

    def __init__(self, site: str, send: Callable[[Report], None], execute: Execute) -> None:
        self._site = site
        self.send = send
        self._execute = execute
        self._epoch = secrets.randbits(53)
        self._sequence = 0
        self._answers: OrderedDict[str, Answer | list[Callable[[Answer], None]]] = OrderedDict()

    def numbers(self) -> tuple[int, int]:
        """Epoch and sequence number of the next report."""
        self._sequence += 1
        return self._epoch, self._sequence

    def loads(self, servers: list[ServerLoad], links: Iterable[LinkLoad]) -> None:
        """Tell all routers of loads."""
        epoch, sequence = self.numbers()
        self.send(SiteLoads(site=self._site, epoch=epoch, sequence=sequence, servers=servers, links=list(links)))

    def command(self, command: Command, reply: Callable[[Answer], None]) -> None:
        """Carry a command out, once for each id, and answer whoever sends it."""
        known = self._answers.get(command.id)
        if isinstance(known, Answer):
            reply(known)
            return
        if known is not None:
            known[:] = [reply]  # it is under way; the router may be connected anew
            return
        waiting = [reply]
        self._answers[command.id] = waiting
        while len(self._answers) > _ANSWERS_KEPT:
            self._answers.popitem(last=False)
        task = self._execute(command)

        def ended(task: asyncio.Task[tuple[bool, str]]) -> None:
            if task.cancelled():
                done, message = False, "the agent stopped"
            elif error := task.exception():
                done, message = False, f"{type(error).__name__}: {error}"
            else:
                done, message = task.result()
            answer = Answer(id=command.id, done=done, message=message)
            self._answers[command.id] = answer
            for send in waiting:
                send(answer)

        task.add_done_callback(ended)
