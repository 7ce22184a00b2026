"""The router's process: until when it serves, and what it needs before."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable

from sglang_prfaas.config.schema import RouterConfig
from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.router.app import Router
from sglang_prfaas.router.tokens import TokenCounter

log = logging.getLogger(__name__)

_GC_OBJECTS = 20_000  # some hundred requests' worth


async def run_router(
    config: RouterConfig,
    *,
    stop: asyncio.Event,
    ready: Callable[[int], None] | None = None,
    counter: TokenCounter | None = None,
) -> None:
    """Serve until `stop` is set, then drain. `ready` gets the port once the router listens.

    Raises ConfigError when the model's tokenizer cannot be loaded, LocalError when the address is taken.
    """
    if counter is None:
        counter = TokenCounter(config.router.model, trust_remote_code=config.router.trust_remote_code)
        await asyncio.to_thread(counter.load)
    router = Router(config, counter)
    try:
        port = await router.start()
        gc.collect()
        gc.freeze()  # the tokenizer's libraries hold many objects: full collections over them would stall requests
        gc.set_threshold(_GC_OBJECTS, 20, 20)
        policy = "live t from" if config.policy.is_live else "t ="
        where = base_url("http", config.router.host, port)
        log.info("router listens on %s, %s %d tokens", where, policy, config.policy.threshold_tokens)
        if ready is not None:
            ready(port)
        models = asyncio.create_task(router.models.watch(config.limits.health_interval_s))
        await stop.wait()
        log.info("router stops: %d requests in work", router.server.active)
        models.cancel()
    finally:
        await router.stop()
        counter.close()


def run(config: RouterConfig, *, ready: Callable[[int], None] | None = None) -> None:
    """Run the router in this process until SIGTERM or SIGINT; blocks. Uses uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:  # not on Windows
        runner = asyncio.Runner()
    else:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await run_router(config, stop=stop, ready=ready)

    with runner:
        runner.run(main())
