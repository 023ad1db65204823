"""What is done beside the flushes, in bounded pieces: second looks, purges, pruning of tombstones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from fastworker.crashpoint import Step
from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.store import statements as sql
from fastworker.store.flush import write_rows
from fastworker.store.session import Connection, translating
from fastworker.store.writer import Writer, columns, halves
from fastworker.table import derive
from fastworker.table.batch import Change, Progress, Refused, newer
from fastworker.table.schema import TABLES, Table, collection_table

TOMBSTONES_KEPT = timedelta(days=7)  # relays replay three days; bounded by what the stream's group has finished, too
HORIZON_NOTICE = timedelta(minutes=2)  # between announcing a horizon and pruning below it; workers look every 10 s
DEAD_COMMIT = timedelta(minutes=2)  # a commit that a dead process sent has arrived by then, or never will
AGAIN_PIECE = 5_000  # tombstones per piece
PRUNE_PIECE = 5_000  # tombstones per transaction
ANNOUNCE_PIECE = 500_000  # tombstones that one horizon covers: with its notice, 4,000 a second
PURGE_PIECE = 1_000  # rows of a deleted account per transaction

log = logging.getLogger(__name__)


class EntryRules(NamedTuple):
    """Which entries may not be written as they are.

    Tombstones up to `pruned_until` are gone, so an older entry may bring back what was deleted. `ambiguous`: seq alone
    orders nothing, so neither may those without a revision.
    """

    pruned_until: datetime
    ambiguous: bool


async def look_again(writer: Writer, db: Connection, *, dead_commit: timedelta) -> int:
    """Once for every tombstone, long after it was written: whether it beats a record that is there all the same.

    A process that died with its commit on the way never looked back; if others had settled its entries, nobody did.
    Returns 0 when no tombstone is due.
    """
    piece = await db.fetchrow(sql.LOOK_AGAIN_PIECE, dead_commit, AGAIN_PIECE)
    if piece is None:
        return 0
    removals = {}  # what is in the table and among the twins is found twice
    for uri, rev, seq in await db.fetch(sql.LOOK_AGAIN, *piece):
        removals[uri] = _delete(collection_table(uri), uri, derive.did_of(uri), rev, seq)
    # mutant: no second look
    if removals and (failed := await _remove(writer, db, list(removals.values()))):
        await db.execute(sql.LOOK_LATER, [change.uri for change, _ in failed])
    await db.execute(sql.LOOKED_AGAIN, *piece)
    return len(removals) + 1


async def purge(writer: Writer, db: Connection, *, dead_commit: timedelta) -> int:
    """Remove one bounded piece of a deleted account's records, like deletes of each of them.

    When nothing is left, once more after a while, for the reason of `look_again`.
    """
    account = await db.fetchrow(sql.PURGE_NEXT, dead_commit)
    if account is None:
        return 0
    did, deleted_seq, deleted_at, gone_rev, gone_seq = account
    tables = {table.name: table for table in TABLES}
    removals: dict[str, Change] = {}
    for name, uri, rev, seq in await db.fetch(sql.PURGE_PIECE, did, gone_rev, gone_seq, PURGE_PIECE):
        held = removals.get(uri)  # a twin of a cold table is found twice
        if held is None or newer(rev, seq, held.rev, held.seq):
            removals[uri] = _delete(tables[name] if name is not None else collection_table(uri), uri, did, rev, seq)
    if removals:
        if failed := await _remove(writer, db, list(removals.values())):
            await db.execute(sql.PURGE_LATER, did, str(failed[0][1])[:500])
        await writer.reach(Step.IN_ACCOUNT_DELETION)
    else:
        await db.execute(sql.PURGED, did, deleted_seq, deleted_at)
    return len(removals) + 1


async def _remove(writer: Writer, db: Connection, removals: list[Change]) -> list[tuple[Change, Exception]]:
    """Remove these records; those that cannot be removed, and why."""
    try:
        with translating():
            await write_rows(writer, db, removals, set())
    except (StoreUnavailable, RowRejected) as error:
        if len(removals) == 1:
            await db.fetchval("SELECT 1")  # it is this record, not the server
            log.warning("%s is removed later: %s", removals[0].uri, error)
            return [(removals[0], error)]
        return [failed for half in halves(removals) for failed in await _remove(writer, db, half)]
    return []


async def keep(writer: Writer, db: Connection, refused: Sequence[Refused]) -> None:
    """Remember these records by name: their entries will be in no dead letter."""
    rows = {one.uri: msgspec.structs.astuple(one) for one in refused}
    if rows:
        await writer.retry(lambda: db.execute(sql.REFUSED, *columns(row for _, row in sorted(rows.items()))))


def _delete(table: Table, uri: str, did: str, rev: str | None, seq: int | None) -> Change:
    return Change(table, uri, did, uri.rpartition("/")[2], rev, seq, 0, None, None)


async def prune(db: Connection, keep: timedelta, notice: timedelta, now: datetime | None) -> int:
    """Forget tombstones that nothing can need any more: one bounded piece. Returns how many went."""
    gone = await db.execute(sql.PRUNE, notice, PRUNE_PIECE)
    await db.execute(sql.FLOORS_PRUNE, notice)
    await db.execute(sql.ANNOUNCE, keep, ANNOUNCE_PIECE, now)
    return int(gone.rpartition(" ")[2])


async def entry_rules(db: Connection) -> EntryRules:
    row = await db.fetchrow(sql.ENTRY_RULES)
    assert row is not None
    # asyncpg reads -infinity as the first naive moment
    until = row["pruned_until"]
    return EntryRules(until.replace(tzinfo=UTC) if until.tzinfo is None else until, row["many_relays"])


async def absent(db: Connection, changes: list[Change]) -> set[str]:
    """uris of the changes of which the database knows nothing, not even that they were deleted."""
    tables: dict[str, tuple[Table, list[str]]] = {}
    for change in changes:
        tables.setdefault(change.table.name, (change.table, []))[1].append(change.uri)
    return {r[0] for table, uris in tables.values() for r in await db.fetch(sql.absent(table), uris)}


async def finished(db: Connection, stream: str) -> Progress | None:
    """The furthest that any consumer saw the stream's group finished: where reader and worker resume."""
    marks = [Progress(stream, "", r[1], r[2]) for r in await db.fetch(sql.FINISHED, [stream])]
    return max(marks, key=lambda mark: [int(part) for part in mark.entry_id.split("-")], default=None)
