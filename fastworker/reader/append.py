"""From the outbox onto the stream: chunk by chunk, in order, and room for them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from fastworker.config import Config
from fastworker.errors import Reason, StreamUnavailable
from fastworker.process.backoff import Backoff
from fastworker.process.outage import Outage
from fastworker.reader.outbox import Outbox
from fastworker.reader.stats import ReaderStats
from fastworker.reader.verify import Verifier
from fastworker.stream.feed import Feed

log = logging.getLogger(__name__)

LINGER_S: Final = 0.01
"""Least time between two appends: at 1,000 events/s a chunk of ten costs a tenth of ten chunks of one."""


async def append_all(
    settings: Config, feed: Feed, outbox: Outbox, stats: ReaderStats, outage: Outage, verifier: Verifier | None = None
) -> None:
    """Chunk by chunk. A chunk that cannot be put down now is kept and tried again: order is never broken."""
    backoff = Backoff(0.1, 5.0)
    while True:
        chunk = await outbox.take()
        begun = time.monotonic()
        if chunk.held and verifier is not None:
            await verifier.finish(chunk)
        while True:
            try:
                if await feed.append(chunk):
                    break
                await _make_room(settings, feed, stats)
            except StreamUnavailable as error:
                stats.last_error = str(error)
                outage.look(str(error), f"{outbox.items:,} entries wait here, and then at the relay")
                await asyncio.sleep(backoff.next())
        backoff.reset()
        outage.look(None)
        stats.full = False
        stats.entries += chunk.entries
        if chunk.seq is not None:
            stats.last_seq = chunk.seq
        if chunk.breaks and verifier is not None:
            verifier.chain.settled(chunk.breaks)
        if not outbox.waiting:
            await asyncio.sleep(max(0.0, begun + LINGER_S - time.monotonic()))


async def _make_room(settings: Config, feed: Feed, stats: ReaderStats) -> None:
    """The stream is full: trim what is finished; when nothing is, wait. The outbox fills and receiving stops.

    What dead workers left at its head, while others read on, would hold it full for ever: that is set aside first.
    """
    result = await feed.trim(make_room=True)
    stats.trimmed += result.trimmed
    stats.held_by = result.held_by
    if result.trimmed:
        return
    if not stats.full:
        stats.full = True
        stats.waits_full += 1
        held = f"group {result.held_by!r} is not done with its oldest entries" if result.held_by else "no group"
        log.warning("The stream %s is full (%s): the reader waits", settings.stream_key, held)
    if result.held_by == settings.group:
        moved, ghosts = await feed.set_aside_abandoned(settings.abandoned_ms)
        if moved or ghosts:
            stats.set_aside += moved
            stats.drops[Reason.ABANDONED] += moved
            log.warning("Set aside %d abandoned entries of dead consumers (%d more were trimmed)", moved, ghosts)
            return
    await asyncio.sleep(0.2)
