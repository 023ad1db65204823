"""`fastworker worker --reapply FROM_ID`: the retained entries from a stream id on, once more through the pipeline.

Heals what an old worker dropped. The state law makes it safe at any time and beside running workers: what is there
already stays as it is. It belongs to no consumer group, acks nothing, and ends at the entry that was the newest when
it began.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, Unreachable, counted
from fastworker.process.backoff import pause
from fastworker.process.board import Heartbeats, Slot, State
from fastworker.process.outage import Outage
from fastworker.store.store import Store
from fastworker.stream.admin import RedisAdmin, open_redis
from fastworker.stream.consumer import Entry, SetAside, Tally
from fastworker.stream.keys import Keys
from fastworker.worker.limits import DeadLetterLimit
from fastworker.worker.pipeline import Pipeline

log = logging.getLogger(__name__)

PIECE: Final = 50  # of up to several megabytes each
PROGRESS_S: Final = 5.0


class _Retained:
    """Where the pipeline's entries come from, and where they end: the stream without its group."""

    def __init__(
        self,
        admin: RedisAdmin,
        keys: Keys,
        after: str,
        last: str,
        stopping: asyncio.Event,
        counts: Counter[str],
    ) -> None:
        self.name = "reapply"
        self.stream_key = keys.stream
        self.partition = keys.partition
        self.backlog = True
        self.counts = counts
        self._admin = admin
        self._after = after
        self._last = last
        self._stopping = stopping

    async def next(self, block_ms: int) -> list[Entry]:  # noqa: ARG002 - nothing new is waited for
        entries = await self._admin.entries(self._after, self._last, PIECE, partition=self.partition)
        if not entries:
            self._stopping.set()
            return []
        self._after = entries[-1][0]
        return entries

    left_behind = False

    def look_again(self) -> None:
        """A reply that was lost took nothing with it: the next look begins where the last one ended."""

    async def ack(self, tallies: Mapping[Tally, Sequence[str]], more_drops: Sequence[str] = ()) -> int:
        for tally, ids in tallies.items():
            self.counts[tally.outcome] += len(ids)
            self.counts["drops"] += len(tally.drops) * len(ids)
        self.counts["drops"] += len(more_drops)
        return sum(map(len, tallies.values()))

    async def set_aside(self, letters: Sequence[SetAside], now_ms: int) -> int:  # noqa: ARG002 - no letter is written
        """Its first delivery has or will set it aside; a second letter would say nothing new."""
        self.counts["not_understood"] += len(letters)
        return len(letters)

    async def pushed_out(self, count: int) -> list[dict[bytes, bytes]]:  # noqa: ARG002
        return []

    async def lowest_pending(self) -> str | None:
        return None


async def reapply(settings: Config, from_id: str) -> ExitCode:
    """Everything from `from_id` (inclusive) on. Raises ConfigError for what is not a stream id."""
    found = re.fullmatch(r"(\d{1,16})(?:-(\d{1,16}))?", from_id)
    if not found:
        raise ConfigError(f"--reapply {from_id!r}: a stream id is milliseconds, or milliseconds-number, such as 0")
    after = _before(int(found[1]), int(found[2] or 0))
    counts: Counter[str] = Counter()
    started = time.monotonic()
    async with open_redis(settings.redis_url, settings.stream_key, client_name="fastworker-reapply") as admin:
        stream = await admin.stream()
        if stream is None or not stream.length:
            sys.stdout.write(f"{settings.stream_key} holds no entries.\n")
            return ExitCode.DONE
        try:
            store = await Store.connect(
                settings.require_database_url("worker --reapply"),
                pool_size=1,
                application_name="fastworker-reapply",
                rules=settings.rules,
            )
        except StoreUnavailable as error:
            raise Unreachable(str(error)) from error
        try:
            for number in range((await admin.parts.layout()).known):  # ids of two partitions may be equal
                keys = Keys(settings.stream_key, settings.group, number)
                await _apply(settings, store, admin, keys, after, stream.last_id, counts)
            while await store.maintain():
                pass
        except StoreUnavailable as error:
            raise Unreachable(str(error)) from error
        finally:
            await store.close()
    applied = counted(counts["committed"] + counts["nothing_to_store"], "entry", "entries")
    sys.stdout.write(
        f"{applied} applied again from {from_id} to "
        f"{stream.last_id}, {counts['drops']:,} drops, {counts['not_understood']:,} not understood, "
        f"{time.monotonic() - started:.1f} s\n"
    )
    return ExitCode.DONE


async def _apply(
    settings: Config,
    store: Store,
    admin: RedisAdmin,
    keys: Keys,
    after: str,
    last: str,
    counts: Counter[str],
) -> None:
    """One partition."""
    stopping = asyncio.Event()
    slot = Heartbeats(1)[0]
    slot.open("reapply")
    source = _Retained(admin, keys, after, last, stopping, counts)
    pipeline = Pipeline(source, source, store, slot, limits=settings.limits, dead_letters=DeadLetterLimit())
    try:
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(_tell(source, slot, stopping))
            await pipeline.run(stopping)
            telling.cancel()
    except* (StoreUnavailable, Unreachable) as group:
        raise Unreachable(str(group.exceptions[0])) from group


def _before(ms: int, n: int) -> str:
    """The id just below, so that reading beyond it begins at the given one."""
    if n:
        return f"{ms}-{n - 1}"
    return f"{ms - 1}-18446744073709551615" if ms else "0-0"


async def _tell(source: _Retained, slot: Slot, stopping: asyncio.Event) -> None:
    """As the monitor does beside a worker."""
    told, at = 0, time.monotonic()
    outages = {State.WAITING_FOR_STORE: Outage("PostgreSQL"), State.WAITING_FOR_STREAM: Outage("Redis")}
    while not await pause(PROGRESS_S, stopping):
        count = source.counts["committed"] + source.counts["nothing_to_store"]
        rate = (count - told) / (time.monotonic() - at)
        log.info("Processed %s events (~%s events/sec)", f"{count:,}", f"{rate:,.0f}")
        told, at = count, time.monotonic()
        look = slot.snapshot()
        for state, outage in outages.items():
            outage.look(look.error or "no error yet" if look.gauges.state == state else None)
