"""What is done beside the flushes, in bounded pieces: owed rows, second looks, purges, pruning of tombstones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from fastworker.crashpoint import Step
from fastworker.store import statements as sql
from fastworker.store.flush import write_rows
from fastworker.store.joined import recompute
from fastworker.store.session import Connection
from fastworker.store.writer import Writer
from fastworker.table import derive
from fastworker.table.batch import Change, Progress, newer
from fastworker.table.schema import TABLES, Table, collection_table

TOMBSTONES_KEPT = timedelta(days=7)  # relays replay three days; bounded by what the stream's group has finished, too
HORIZON_NOTICE = timedelta(minutes=2)  # between announcing a horizon and pruning below it; workers look every 10 s
DEAD_COMMIT = timedelta(minutes=2)  # a commit that a dead process sent has arrived by then, or never will
AGAIN_PIECE = 5_000  # tombstones per piece
PRUNE_PIECE = 5_000  # tombstones per transaction
PURGE_PIECE = 1_000  # rows of a deleted account per transaction
OWED_PIECE = 1_000  # joined rows recomputed per transaction


class Ground(NamedTuple):
    """What an entry may assume: tombstones up to `pruned_until` are gone; `ambiguous`: seq alone orders nothing."""

    pruned_until: datetime
    ambiguous: bool


async def maintain(writer: Writer, db: Connection, owed_age_s: float, dead_commit: timedelta) -> int:
    """One bounded piece of each: joined rows that are owed, second looks, purges. Returns how much was done."""
    owed = await db.fetch(sql.OWED, owed_age_s, OWED_PIECE)
    if owed:
        await writer.reach(Step.IN_RECHECK)
        await recompute(writer, db, {(r[0], r[1]): r[2] for r in owed}, set())
    return len(owed) + await _look_again(writer, db, dead_commit) + await _purge(writer, db, dead_commit)


async def _look_again(writer: Writer, db: Connection, dead_commit: timedelta) -> int:
    """Once for every tombstone, long after it was written: whether it beats a record that is there all the same.

    A process that died with its commit on the way never looked back; if others had settled its entries, nobody did.
    Returns 0 when no tombstone is due.
    """
    piece = await db.fetchrow(sql.LOOK_AGAIN_PIECE, dead_commit, AGAIN_PIECE)
    if piece is None:
        return 0
    kills = {}  # what is in the table and among the twins is found twice
    for uri, rev, seq in await db.fetch(sql.LOOK_AGAIN, *piece):
        kills[uri] = _kill(collection_table(uri), uri, derive.did_of(uri), rev, seq)
    if kills:
        await write_rows(writer, db, list(kills.values()), set())
    await db.execute(sql.LOOKED_AGAIN, *piece)
    return len(kills) + 1


async def _purge(writer: Writer, db: Connection, dead_commit: timedelta) -> int:
    """Remove one bounded piece of a deleted account's records, like deletes of each of them.

    When nothing is left, once more after a while, for the reason of `_look_again`.
    """
    account = await db.fetchrow(sql.PURGE_NEXT, dead_commit)
    if account is None:
        return 0
    did, deleted_seq, deleted_at, gone_rev, gone_seq = account
    tables = {table.name: table for table in TABLES}
    kills: dict[str, Change] = {}
    for name, uri, rev, seq in await db.fetch(sql.PURGE_PIECE, did, gone_rev, gone_seq, PURGE_PIECE):
        held = kills.get(uri)  # a twin of a cold table is found twice
        if held is None or newer(rev, seq, held.rev, held.seq):
            kills[uri] = _kill(tables[name] if name is not None else collection_table(uri), uri, did, rev, seq)
    if kills:
        await write_rows(writer, db, list(kills.values()), set())
        await writer.reach(Step.IN_ACCOUNT_DELETION)
    else:
        await db.execute(sql.PURGED, did, deleted_seq, deleted_at)
    return len(kills) + 1


def _kill(table: Table, uri: str, did: str, rev: str | None, seq: int | None) -> Change:
    return Change(table, uri, did, uri.rpartition("/")[2], rev, seq, 0, None, None)


async def prune(db: Connection, keep: timedelta, notice: timedelta) -> int:
    """Forget tombstones that nothing can need any more: one bounded piece. Returns how many went."""
    gone = await db.execute(sql.PRUNE, notice, PRUNE_PIECE)
    await db.execute(sql.ANNOUNCE, keep, PRUNE_PIECE)
    return int(gone.rpartition(" ")[2])


async def ground(db: Connection) -> Ground:
    row = await db.fetchrow(sql.GROUND)
    assert row is not None
    # asyncpg reads -infinity as the first naive moment
    return Ground(row[0].replace(tzinfo=UTC) if row[0].tzinfo is None else row[0], row[1])


async def absent(db: Connection, changes: list[Change]) -> set[str]:
    """uris of the changes of which the database knows nothing, not even that they were deleted."""
    tables: dict[str, tuple[Table, list[str]]] = {}
    for change in changes:
        tables.setdefault(change.table.name, (change.table, []))[1].append(change.uri)
    return {r[0] for table, uris in tables.values() for r in await db.fetch(sql.absent(table), uris)}


async def finished(db: Connection, stream: str) -> Progress | None:
    """The furthest that any consumer saw the stream's group finished: where reader and worker resume."""
    marks = [Progress(stream, r[0], r[1], r[2]) for r in await db.fetch(sql.FINISHED, stream)]
    return max(marks, key=lambda mark: [int(part) for part in mark.entry_id.split("-")], default=None)
