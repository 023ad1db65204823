"""Rows that somebody else has locked: entries that touch one wait for it, and the others go on.

An operator's transaction that is left open, or the API's: whoever waits for its row holds up a whole batch, and the
next one of each pipeline. PostgreSQL says which row it was; a look tells whether it is still locked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.store.blame import LockedRow, RowLocked
from fastworker.table.batch import Change
from fastworker.worker.held import Held
from fastworker.worker.turn import Turn

log = logging.getLogger(__name__)

ROWS_MAX = 3
"""Found by one flush, at a lock timeout each: where more are locked, it waits for all of them."""
LOOK_S = 1.0


class Locks:
    """What the pipelines of one process know of locked rows."""

    def __init__(self) -> None:
        self.rows: dict[LockedRow, RowLocked] = {}

    def add(self, error: RowLocked) -> None:
        if error.row not in self.rows:
            log.warning("Entries that touch %s of %s wait, the others go on: %s", error.row.key, error.row.table, error)
        self.rows[error.row] = error

    def keep(self, locked: Iterable[LockedRow]) -> None:
        """Keep only these: the other rows are free."""
        for row in self.rows.keys() - set(locked):
            log.info("%s of %s is no longer locked", row.key, row.table)
            del self.rows[row]

    def touched_by(self, entry_id: str, held: Held) -> RowLocked | None:
        """The first of the locked rows that an entry may touch. What a delete touches is not known."""
        if not self.rows:
            return None
        changes = held.changes.get(entry_id, ())
        did = changes[0].repo if changes else _did_of(held.entries[entry_id])
        for row, error in self.rows.items():
            if row.key == did or any(_touches(change, row.key) for change in changes):
                return error
        return None


class Waiting:
    """Entries of one pipeline that wait for a row."""

    def __init__(self, locks: Locks | None = None) -> None:
        self.locks = locks or Locks()
        self.entries: dict[str, tuple[dict[bytes, bytes], int, LockedRow]] = {}  # id -> fields, since when, what
        self._looked_at = 0.0

    @property
    def since_ms(self) -> int:
        return next((since_ms for _, since_ms, _ in self.entries.values()), 0)

    @property
    def is_time_to_look(self) -> bool:
        if not self.entries or time.monotonic() < self._looked_at + LOOK_S:
            return False
        self._looked_at = time.monotonic()
        return True

    def first_of(self, held: Held) -> RowLocked | None:
        """A row that is known to be locked, and that this batch touches."""
        return next(filter(None, (self.locks.touched_by(one, held) for one in held.batch.entries)), None)

    async def put_by(self, held: Held, error: RowLocked) -> Held:
        """What is left of a batch that ran into a locked row, without the entries that touch it; they wait.

        If nothing is seen to touch it, deletes may; if there are none, all of it is left.
        """
        self.locks.add(error)
        ids = held.batch.entries
        by = {one: found.row for one in ids if (found := self.locks.touched_by(one, held)) is not None}
        if not by:
            by = {one: error.row for one in ids if any(c.row is None for c in held.changes.get(one, ()))}
        if not by:
            return held
        rest = Held()
        rest.since_ms = held.since_ms
        turn = Turn()
        for one in ids:
            if one in by:
                self.entries[one] = held.entries[one], held.since_ms, by[one]
            else:
                rest.apply(one, held.entries[one])
            if turn.is_over():
                await turn.next()
        return rest

    def take_free(self) -> dict[str, tuple[dict[bytes, bytes], int]]:
        """Those whose row is locked no more."""
        free = {one: (fields, ms) for one, (fields, ms, row) in self.entries.items() if row not in self.locks.rows}
        for one in free:
            del self.entries[one]
        return free


def _did_of(fields: dict[bytes, bytes]) -> str:
    event = decode_entry(fields)
    return event.repo if isinstance(event, Commit) else event.did


def _touches(change: Change, key: str) -> bool:
    values: Sequence[object] = change.row or ()
    return key in change.uri or any(type(value) is str and key in value for value in values)
