"""Rows that somebody else has locked: entries that touch one wait for it, and the others go on.

An operator's transaction that is left open, or the API's: whoever waits for its row holds up a whole batch, and the
next one of each pipeline. PostgreSQL says which row it was; a look tells whether it is still locked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from fastworker.store.blame import LockedRow, RowLocked
from fastworker.table.batch import Change

log = logging.getLogger(__name__)

ROWS_MAX = 3
"""Found by one flush, at a lock timeout each: where more are locked, it waits for all of them."""


class Locks:
    """What the pipelines of one process know of locked rows."""

    def __init__(self) -> None:
        self.rows: dict[LockedRow, str] = {}  # and what was said of it

    def add(self, error: RowLocked) -> None:
        if error.row not in self.rows:
            log.warning("Entries that touch %s of %s wait, the others go on: %s", error.row.key, error.row.table, error)
        self.rows[error.row] = str(error)

    def keep(self, locked: Iterable[LockedRow]) -> None:
        """The others are free."""
        for row in self.rows.keys() - set(locked):
            log.info("%s of %s is no longer locked", row.key, row.table)
            del self.rows[row]

    def touched_by(self, did: str, changes: Sequence[Change]) -> LockedRow | None:
        """The first of them that the account's changes may touch. Of a delete nobody knows what it touches."""
        for row in self.rows:
            if row.key == did or any(_touches(change, row.key) for change in changes):
                return row
        return None


def _touches(change: Change, key: str) -> bool:
    return key in change.uri or any(type(value) is str and key in value for value in change.row or ())
