"""A PostgreSQL that went back: a lagging standby was promoted, an earlier state was restored, or it is another server.

What was acknowledged after that moment is in no table. Before the first statement of each new session the server is
compared with what Redis remembers of it. If it went back, the group goes back to the server's own progress, and the
reader to its seq: the state law makes it harmless to give events again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fastworker.errors import StoreUnavailable, StreamUnavailable
from fastworker.store.place import NewConnection, Place, places_of
from fastworker.store.store import Store
from fastworker.stream.client import Redis
from fastworker.stream.cluster import node_of
from fastworker.stream.database import Database, GoBack, Known, Memory
from fastworker.stream.ids import id_order
from fastworker.stream.keys import Keys
from fastworker.stream.partitions import layout

log = logging.getLogger(__name__)

REDIS_S: Final = 5.0  # that a new session waits for Redis
ATTEMPTS_MAX: Final = 10  # to change what other workers change at the same time


class Failover:
    """What one process does about it, for all partitions of a stream."""

    def __init__(self, redis: Redis, stream_key: str, group: str) -> None:
        self._redis = redis
        self._stream_key = stream_key
        self._group = group
        self._partitions: list[_Partition] = []

    async def meet(self, connection: NewConnection) -> None:
        """Before anything is written in this session. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(REDIS_S):
                partitions = await self._known()
                for _ in range(ATTEMPTS_MAX):
                    memories = [await one.database.look() for one in partitions]  # before the server is asked
                    places = await places_of(connection, [one.stream for one in partitions])
                    asked = zip(partitions, memories, places, strict=True)
                    partitions = [one for one, memory, found in asked if not await one.meet(memory, found)]
                    if not partitions:
                        return
        except (StreamUnavailable, TimeoutError) as error:
            why = str(error) or "Redis did not answer in time"
            raise StoreUnavailable(f"A session in PostgreSQL begins with a look into Redis: {why}") from error
        raise StoreUnavailable("Other workers find out at the same time which PostgreSQL this is")

    async def note(self, store: Store) -> None:
        """Remember how far the server got. Raises StoreUnavailable and StreamUnavailable."""
        partitions = await self._known()
        memories = [await one.database.look() for one in partitions]
        async with store.connection() as connection:
            places = await places_of(connection, [one.stream for one in partitions])
        for one, memory, found in zip(partitions, memories, places, strict=True):
            known = memory.known
            if known is None or (known.system, known.timeline) == (found.system, found.timeline):
                await one.note(memory, found)

    async def _known(self) -> list[_Partition]:
        known = (await layout(self._redis, self._stream_key)).known
        for number in range(len(self._partitions), known):
            keys = Keys(self._stream_key, self._group, number)
            node = node_of(self._redis, keys.stream)
            self._partitions.append(_Partition(keys.stream, Database(node, keys, self._group)))
        return self._partitions[:known]


class _Partition:
    def __init__(self, stream: str, database: Database) -> None:
        self.stream = stream
        self.database = database
        self._inserted = 0  # end of a record when we looked last

    async def meet(self, memory: Memory, found: Place) -> bool:
        """False: somebody else changed what is remembered at the same time."""
        if why := _what_happened(memory.known, found):
            return await self._go_back(memory, found, why)
        return await self.note(memory, found)

    async def note(self, memory: Memory, found: Place) -> bool:
        # What ended a record at the last look, and is on disk now, no restart takes back.
        written = self._inserted if self._inserted <= found.flushed else 0
        self._inserted = found.inserted
        before = memory.known or Known()
        # Progress that somebody wrote since may be behind: Redis went back, and has entries pending that were not.
        is_newer = found.noted_us > before.noted_us
        now = Known(
            system=found.system,
            timeline=found.timeline,
            written=max(written, before.written),
            entry_id=found.entry_id if is_newer else max(before.entry_id, found.entry_id, key=_order),
            noted_us=max(before.noted_us, found.noted_us),
        )
        return now == memory.known or await self.database.remember(memory, now) >= 0

    async def _go_back(self, memory: Memory, found: Place, why: str) -> bool:
        self._inserted = found.inserted
        now = Known(system=found.system, timeline=found.timeline, entry_id=found.entry_id, noted_us=found.noted_us)
        again = await self.database.remember(
            memory, now, back_to=found.entry_id or "0-0", reader=GoBack(found.seq, found.relay)
        )
        if again >= 0:
            place = f"entry {found.entry_id}" if found.entry_id else "the beginning: it knows of no progress"
            log.error(
                "PostgreSQL went back (%s): on %s the group goes back to %s, %d finished entries are given again, and "
                "what the stream no longer has comes again from the relay", why, self.stream, place, again,
            )  # fmt: skip
        return again >= 0


def _order(entry_id: str) -> tuple[int, int]:
    return id_order(entry_id) if entry_id else (0, 0)


def _what_happened(known: Known | None, found: Place) -> str:
    """Why acknowledged data may be missing; empty: all of it is there."""
    if known is None:
        return ""
    if known.system and found.system:
        if known.system != found.system:
            return f"it is another server, system identifier {found.system}, not {known.system}"
        if known.timeline != found.timeline:
            return f"it is on timeline {found.timeline}, not {known.timeline}"
        if found.flushed < known.written:
            return f"its log ends {known.written - found.flushed:,} bytes before what was written"
    is_ours = 0 < known.noted_us < found.noted_us  # what is behind was written by a worker, and by no restore
    # mutant: a worker's own progress looks like a restore
    if _order(found.entry_id) < _order(known.entry_id) and not is_ours:
        return f"its progress is {found.entry_id or 'none'}, and was {known.entry_id}"
    return ""
