"""The steps of a flush and of what surrounds it, where a test may kill the process, and what recovery must do there.

A no-op unless `arm` was called (at the start of a child, with the value of FASTWORKER_CRASHPOINT that the command
line read). The process dies as with a pulled plug: nothing is flushed, released or closed.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum

from fastworker.errors import ConfigError


class Step(StrEnum):
    """Where to die. What the next process finds, and must do, stands beside each."""

    LOOKED = "looked"
    """A flush knows what beats its batch; nothing is written, all entries pending. Deliver again."""
    HANDLES_DECIDED = "handles_decided"
    """Which account shows which handle is written, not committed. PostgreSQL rolls back. Deliver again."""
    AFTER_TOMBSTONE_COMMIT = "after_tombstone_commit"
    """Tombstones are there, rows are not; all entries pending. Deliver again: the same flush, the same result."""
    ROWS_WRITTEN = "rows_written"
    """In the main transaction, what follows from the rows is not written. PostgreSQL rolls back. Deliver again."""
    BEFORE_MAIN_COMMIT = "before_main_commit"
    """Everything of the main transaction is written. PostgreSQL rolls back. As above."""
    AFTER_MAIN_COMMIT = "after_main_commit"
    """Rows are committed, not looked back at, nothing is acked. Deliver again: unchanged rows, then the look back."""
    OWED_RECOMPUTED = "owed_paid"
    """As AFTER_MAIN_COMMIT, and the joined rows that the transaction left owed are recomputed."""
    AFTER_LOOK_BACK = "after_look_back"
    """Everything is written, nothing is acked. Deliver again: nothing changes, then the ack."""
    FLOOR_COMMITTED = "floor_committed"
    """A settle's floor is there, nothing is compared. The next process that claims the account settles it."""
    BEFORE_ACK = "before_ack"
    """As AFTER_LOOK_BACK, seen from the pipeline: also for entries with nothing to store and for halves of a batch."""
    BETWEEN_DEAD_LETTER_AND_ACK = "between_dead_letter_and_ack"
    """Cannot be reached in the product: dead letter and ack are one script. The place is just before that script: the
    entry is still pending and is set aside once by whoever reads it next."""
    IN_CLAIM = "in_claim"
    """Entries of a dead consumer are ours, but nobody read them yet: found as our own pending ones at the next start
    under this consumer's name, or claimed from us when our lease is gone."""
    IN_RECHECK = "in_recheck"
    """Roots, and keys that no payment could pay for ten seconds: drained at the next start or tick."""
    IN_MIGRATION = "in_migration"
    """The migration's transaction rolls back; the next `fastworker migrate` runs it again, whole."""
    IN_ACCOUNT_DELETION = "in_account_deletion"
    """Some of the account's records are gone; `purge_pending` is still set: the next purge goes on."""
    BULK_STAGING = "bulk_staging"
    """Repositories are claimed and their rows copied, not committed. PostgreSQL rolls back; they are staged again."""
    BULK_HELD = "bulk_held"
    """Nobody else may write. The same command goes on loading; until then live events wait on the stream."""
    BULK_IN_STEP = "bulk_in_step"
    """A table is loaded and its indexes are built, not committed. PostgreSQL rolls back: it is as it was before."""
    BULK_AFTER_STEP = "bulk_after_step"
    """A table is loaded and that is recorded. The same command goes on with the next one."""
    BULK_RELEASED = "bulk_released"
    """All is loaded, everybody may write. The same command settles what is left, one by one."""


_armed: Step | None = None
_passes_left = 0


def arm(text: str | None) -> None:
    """Arm from `name` or `name:n` (die at the n-th pass, from 1); None or empty disarms."""
    global _armed, _passes_left  # noqa: PLW0603 - one process has one way to die
    if not text:
        _armed = None
        return
    name, _, nth = text.partition(":")
    try:
        _armed, _passes_left = Step(name), int(nth or 1)
    except ValueError:
        raise ConfigError(
            f"FASTWORKER_CRASHPOINT={text!r}: allowed are {', '.join(Step)}, each with `:n` for the n-th pass"
        ) from None


def crashpoint(place: Step) -> None:
    """Die here if a test asked for it."""
    global _passes_left  # noqa: PLW0603
    if place is not _armed:
        return
    _passes_left -= 1
    if _passes_left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
