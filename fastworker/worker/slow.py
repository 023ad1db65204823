"""Entries that PostgreSQL does not get done in time while it gets others done: tried alone, the others go on.

A trigger of the API's may be slow for what one row says, or wait for a lock that only this row needs. No batch with
such a row in it ends in time. It is written in pieces then, each with little time, until the row is alone. That one
waits, and is tried again. If it was code of the database's own that ran out of time, it is set aside at the third try;
what waits for a lock, or is slow in a statement of ours, is waited for.
"""

from __future__ import annotations

import logging
import time
from typing import Final, NamedTuple

from fastworker.store.blame import TooSlow
from fastworker.store.session import ALONE, HURRY, Time
from fastworker.worker.held import Held

log = logging.getLogger(__name__)

PIECES: Final = 16
"""Of a batch that was not done in time: three steps down to one entry of 2,500."""
USUAL = Time(statement_s=None, all_s=95)
"""The session's own limit. More than a command may take (90 s): the edge speaks first; and less than an attempt."""
TRIES: Final = 3
PAUSES_S: Final = (10.0, 40.0, 60.0)
HURRY_FOR_S: Final = 600.0
"""After a batch that was not done in time: so long every batch has little time."""


class _One(NamedTuple):
    """An entry that waits. `due`: when it is tried again, by the monotonic clock."""

    fields: dict[bytes, bytes]
    since_ms: int
    due: float
    error: TooSlow


class Slow:
    """What one pipeline keeps of entries that are too slow."""

    def __init__(self) -> None:
        self.entries: dict[str, _One] = {}
        self._tries: dict[str, int] = {}
        self._hurry_until = 0.0
        self._was_tried = False

    @property
    def since_ms(self) -> int:
        return min((one.since_ms for one in self.entries.values()), default=0)

    @property
    def words(self) -> str:
        return next((str(one.error) for one in self.entries.values()), "")

    def time_for(self, held: Held | None) -> Time:
        ids = held.batch.entries if held is not None else []
        if len(ids) == 1 and self._tries.get(ids[0], 0) == TRIES - 1:
            return ALONE
        if len(ids) == 1 and self._tries.get(ids[0], 0) >= TRIES:
            return USUAL
        return HURRY if time.monotonic() < self._hurry_until else USUAL

    def hurry(self, count: int, error: TooSlow) -> None:
        """From now on every batch has little time, since one had too little."""
        if time.monotonic() >= self._hurry_until:
            log.warning("%d entries were not done in time: they are written in small pieces. %s", count, error)
        self._hurry_until = time.monotonic() + HURRY_FOR_S

    def put_by(self, entry_id: str, fields: dict[bytes, bytes], since_ms: int, error: TooSlow) -> bool:
        """Keep an entry that was alone. False: it was tried often enough, and is to be set aside."""
        tries = self._tries[entry_id] = self._tries.get(entry_id, 0) + 1
        # mutant: what is too slow is tried for ever
        if tries >= TRIES and error.is_contents:
            return False
        pause_s = PAUSES_S[min(tries, len(PAUSES_S)) - 1]
        self.entries[entry_id] = _One(fields, since_ms, time.monotonic() + pause_s, error)
        log.debug("Entry %s is not done in time, and waits alone (try %d): %s", entry_id, tries, error)
        return True

    def take_due(self, *, others: bool) -> Held | None:
        """One that is to be tried again. `others`: other entries are to be written; it takes turns with them."""
        if self._was_tried and others:
            self._was_tried = False
            return None
        now = time.monotonic()
        due = next((entry_id for entry_id, one in self.entries.items() if one.due <= now), None)
        self._was_tried = due is not None
        if due is None:
            return None
        one = self.entries.pop(due)
        held = Held()
        held.since_ms = one.since_ms
        held.apply(due, one.fields)
        return held

    def forget(self, entry_id: str) -> bool:
        """It was settled. Whether it had waited."""
        return self._tries.pop(entry_id, None) is not None
