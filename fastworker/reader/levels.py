"""What a reader at work has for verification: the chain, and at the levels above it the keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from fastworker.config import Config
from fastworker.reader.chain import Chain
from fastworker.reader.prover import Provers
from fastworker.reader.receive import Receiver
from fastworker.reader.stats import ReaderStats
from fastworker.reader.verify import Verifier, state_file
from fastworker.stream.feed import Feed

Beside = list[Callable[[], Coroutine[Any, Any, None]]]
"""What runs as long as the reader does."""


def require_curves(settings: Config) -> None:
    """Raises ConfigError where the level needs the extra `verify`, and it is not installed."""
    if settings.verify in ("signed", "full"):
        from fastworker.sync import keys  # noqa: F401, PLC0415 - says what is missing


@asynccontextmanager
async def verifying(settings: Config, feed: Feed, receiver: Receiver, stats: ReaderStats) -> AsyncIterator[Beside]:
    """The receiver has its verifier while the block lasts. Raises ConfigError where the extra is not installed."""
    beside: Beside = []
    if settings.verify == "off":
        yield beside
        return
    full = settings.verify == "full"
    async with AsyncExitStack() as stack:
        chain = Chain(state_file(settings, "chain"), settings.chain_bytes)
        stack.callback(chain.close)
        keys = None
        if settings.verify != "chain":
            from fastworker.reader.aside import judge_aside  # noqa: PLC0415 - the chain needs no keys
            from fastworker.reader.keys import KeyRing  # noqa: PLC0415 - nor curves
            from fastworker.sync.hosts import Hosts  # noqa: PLC0415

            hosts = await stack.enter_async_context(Hosts(settings.plc_url))
            keys = KeyRing(hosts, state_file(settings, "keys"))
            beside.append(keys.run)
        provers = None
        if keys is not None and settings.verify_processes:
            provers = await stack.enter_async_context(Provers(settings.verify_processes, full=full))
        verifier = receiver.verifier = Verifier(chain, keys, stats, receiver.deliver, full=full, provers=provers)
        stack.push_async_callback(verifier.stop)
        if provers is not None:
            receiver.outbox.on_full = verifier.begin
        if keys is not None:
            beside.append(partial(judge_aside, feed, receiver.outbox, verifier, keys, full=full))
        try:
            yield beside
        finally:
            receiver.verifier = receiver.outbox.on_full = None
