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
from fastworker.store.place import NewConnection, Place, place_of
from fastworker.store.store import Store
from fastworker.stream.client import Redis
from fastworker.stream.database import Database, GoBack, Known, Memory
from fastworker.stream.ids import id_order

log = logging.getLogger(__name__)

REDIS_S: Final = 5.0  # that a new session waits for Redis
ATTEMPTS_MAX: Final = 10  # to change what other workers change at the same time


class Failover:
    """What one process does about it."""

    def __init__(self, redis: Redis, stream_key: str, group: str) -> None:
        self._stream_key = stream_key
        self._database = Database(redis, stream_key, group)
        self._inserted = 0  # end of a record when we looked last

    async def meet(self, connection: NewConnection) -> None:
        """Before anything is written in this session. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(REDIS_S):
                for _ in range(ATTEMPTS_MAX):
                    memory = await self._database.look()  # read first: the server must be at least that far
                    found = await place_of(connection, self._stream_key)
                    why = _what_happened(memory.known, found)
                    if why and await self._go_back(memory, found, why):
                        return
                    if not why and await self._note(memory, found):
                        return
        except (StreamUnavailable, TimeoutError) as error:
            why = str(error) or "Redis did not answer in time"
            raise StoreUnavailable(f"A session in PostgreSQL begins with a look into Redis: {why}") from error
        raise StoreUnavailable("Other workers find out at the same time which PostgreSQL this is")

    async def note(self, store: Store) -> None:
        """Remember how far the server got. Raises StoreUnavailable and StreamUnavailable."""
        memory = await self._database.look()
        async with store.connection() as connection:
            found = await place_of(connection, self._stream_key)
        known = memory.known
        if known is None or (known.system, known.timeline) == (found.system, found.timeline):
            await self._note(memory, found)

    async def _note(self, memory: Memory, found: Place) -> bool:
        # What ended a record at the last look, and is on disk now, no restart takes back.
        written = self._inserted if self._inserted <= found.flushed else 0
        self._inserted = found.inserted
        before = memory.known or Known()
        now = Known(
            system=found.system,
            timeline=found.timeline,
            written=max(written, before.written),
            entry_id=max(before.entry_id, found.entry_id, key=_order),
        )
        return now == memory.known or await self._database.remember(memory, now) >= 0

    async def _go_back(self, memory: Memory, found: Place, why: str) -> bool:
        self._inserted = found.inserted
        now = Known(system=found.system, timeline=found.timeline, entry_id=found.entry_id)
        again = await self._database.remember(
            memory, now, back_to=found.entry_id or "0-0", reader=GoBack(found.seq, found.relay)
        )
        if again >= 0:
            place = f"entry {found.entry_id}" if found.entry_id else "the beginning: it knows of no progress"
            log.error(
                "PostgreSQL went back (%s): the group goes back to %s, %d finished entries are given again, and what "
                "the stream no longer has comes again from the relay", why, place, again,
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
    if _order(found.entry_id) < _order(known.entry_id):
        return f"its progress is {found.entry_id or 'none'}, and was {known.entry_id}"
    return ""
