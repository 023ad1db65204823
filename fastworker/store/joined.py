"""Rows that join two records (thread contexts, gate flags, like counts of services, empty aggregates)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial

from asyncpg.exceptions import QueryCanceledError

from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.store import statements as sql
from fastworker.store.look import Key
from fastworker.store.session import STATEMENT_TIMEOUT, Connection, translating
from fastworker.store.writer import Writer, columns
from fastworker.table.batch import Change
from fastworker.table.rows import GATE
from fastworker.table.schema import FEED_GENERATORS, GATES, LABELER_SERVICES

NEVER = datetime(1970, 1, 1, tzinfo=UTC)  # a time before any key was owed: none is deleted with it
CROWD_LOOK_S = 600  # to list the replies of a thread


async def recompute_joined(writer: Writer, db: Connection, upserts: list[Change], seen: set[Key]) -> None:
    """Recompute the joined rows that these upserts may have changed; `seen`: those of hot tables, by `look_back`.

    Last in a flush, after this side has committed: of two flushes that write the two sides, the later one sees both.
    What a removal changes was owed in its own transaction, and is not repeated here.
    """
    if keys := seen | keys_of(writer, upserts):
        await recompute_or_owe(writer, db, {}, keys)


def keys_of(writer: Writer, upserts: list[Change]) -> set[Key]:
    """Joined rows that upserts of cold tables may have changed."""
    keys = set()
    flags, services = "gate_flags" in writer.derive, "like_counts" in writer.derive
    for change in upserts:
        if change.table is GATES and flags and change.row is not None:
            keys.add(("gate", change.row[GATE.post_uri]))
        elif services and change.table in (FEED_GENERATORS, LABELER_SERVICES):
            keys.add(("like_count", change.uri))
    return keys


async def recompute_or_owe(
    writer: Writer, db: Connection, owed: dict[Key, datetime], fresh: set[Key], *, note: int | None = None
) -> None:
    """What a flush does after its commit: nothing is waited for, and what the database refuses, or
    has not ready in time, is left owed by key.

    Whoever pays finds out which of the keys it is, and puts that one back.
    """
    try:
        with translating():
            await recompute(writer, db, owed, fresh, note=note, wait=False)
    except (RowRejected, StoreUnavailable) as error:
        if isinstance(error, StoreUnavailable) and not isinstance(error.__cause__, QueryCanceledError):
            raise
        # mutant: a joined row that is refused stops its flush
        await _owe(writer, db, owed.keys() | fresh, note)


async def _owe(writer: Writer, db: Connection, keys: set[Key], note: int | None) -> None:
    await writer.retry(lambda: db.execute(sql.OWE, *columns(sorted(keys))))
    await db.execute(sql.NOTE_DONE, note)


async def recompute(
    writer: Writer,
    db: Connection,
    owed: dict[Key, datetime],
    fresh: set[Key],
    *,
    note: int | None = None,
    wait: bool = True,
) -> None:
    """Recompute joined rows under the lock of the row that carries them; owed keys are deleted with it, or the `note`
    that has them.

    Without `wait`, a post that another flush has locked is left owed instead: `maintain` comes back to it.
    """
    keys = owed.keys() | fresh
    # mutant: a crowd at once
    crowds = await crowded(writer, db, keys)
    if crowds and not wait:
        if note is not None:
            await writer.retry(lambda: db.execute(sql.OWE_ROOTS, sorted(crowds)))
        owed = {key: since for key, since in owed.items() if key[0] != "root" or key[1] not in crowds}
        keys = keys - {("root", root) for root in crowds}
    elif crowds:
        for root in sorted(crowds):
            await _recompute_crowd(writer, db, root)
    by_kind: dict[str, list[str]] = {kind: [] for kind in sql.JOINED}
    for kind, key in sorted(keys):
        if kind != "root" or key not in crowds:
            by_kind[kind].append(key)
    done = columns((*key, since) for key, since in sorted(owed.items())) or [()] * 3
    await writer.retry(lambda: db.execute(sql.RECOMPUTE, *by_kind.values(), *done, note, wait, *writer.counted))


async def crowded(writer: Writer, db: Connection, keys: Iterable[Key]) -> set[str]:
    """Roots among these whose replies are too many to be recomputed at once."""
    roots = sorted(key for kind, key in keys if kind == "root")
    return {r[0] for r in await db.fetch(sql.CROWDED, roots, writer.crowd)} if roots else set()


async def _recompute_crowd(writer: Writer, db: Connection, root: str) -> None:
    """The contexts of all replies of a large thread, in transactions of their own."""
    await db.execute(f"SET statement_timeout = '{CROWD_LOOK_S}s'")
    try:
        await db.execute(sql.CROWD.format(root=root.replace("'", "''")), timeout=CROWD_LOOK_S)
        await db.execute(STATEMENT_TIMEOUT)
        while piece := [r[0] for r in await db.fetch(sql.CROWD_PIECE.format(count=writer.crowd))]:
            piece.sort()
            owed = (["context"] * len(piece), piece, [NEVER] * len(piece))
            await writer.retry(
                partial(db.execute, sql.RECOMPUTE, piece, [], [], [], [], *owed, None, True, *writer.counted)
            )
    finally:
        if not db.is_closed():
            await db.execute(f"{STATEMENT_TIMEOUT}; CLOSE ALL")
