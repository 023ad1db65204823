"""What committed transactions owe: counters that another one was paying, joined rows whose post was locked.

It is paid by whoever comes next, and by a tick of every process. What can never be paid is put back alone, with its
reason.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import NamedTuple

from fastworker.crashpoint import Step
from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.store import statements as sql
from fastworker.store.joined import crowded, recompute
from fastworker.store.look import Key
from fastworker.store.session import Connection, translating
from fastworker.store.writer import Writer, halves

OWED_PIECE = 1_000  # joined rows recomputed per transaction

log = logging.getLogger(__name__)


class Debts(NamedTuple):
    """How much is owed at a moment: counters, joined rows, notes of flushes.

    `oldest_s`: seconds since the oldest of it was owed, of what is not put back. `put_back`: how many were, because
    they cannot be paid; `error`: which one of these is, and why.
    """

    owed: int
    oldest_s: float
    put_back: int
    error: str


async def look(db: Connection) -> Debts:
    row = await db.fetchrow(sql.DEBTS)
    assert row is not None
    return Debts(*row)


async def pay(writer: Writer, db: Connection) -> int | None:
    """Ours and others'; what another one is paying is left to him. Returns how many were paid.

    In transactions of its own, in which no other lock is held: nobody waits for it. None: joined rows were refused or
    not ready in time, and are still owed. Counters of which this is true are put back where they are paid.
    """
    try:
        with translating():
            paid: int | None = await writer.retry(lambda: db.fetchval(sql.PAY, *writer.counted))
    except RowRejected:  # by a constraint that is checked at commit
        return None
    return paid


async def pay_apart(writer: Writer, db: Connection) -> int:
    """As `pay`, for who has no flush to finish: joined rows that are refused are found one by one and put back."""
    paid = await pay(writer, db)
    return await _recompute_due(writer, db, age_s=0) if paid is None else paid


async def recompute_owed(writer: Writer, db: Connection, *, age_s: float) -> int:
    """One piece of the joined rows that `pay` has left for so long: what it does not wait for is waited for here.

    Notes of that age are of flushes that were killed. Returns how many there were.
    """
    # mutant: notes that are left are forgotten
    await writer.retry(lambda: db.execute(sql.NOTES_LEFT, age_s))
    return await _recompute_due(writer, db, age_s=age_s)


async def next_crowd(writer: Writer, db: Connection) -> tuple[str, datetime] | None:
    """The root of a large thread whose joined rows are owed, and since when; None while somebody pays another."""
    found = await db.fetchrow(sql.NEXT_CROWD, writer.crowd)
    return None if found is None else (found[0], found[1])


async def pay_crowd(writer: Writer, db: Connection, root: str, owed_at: datetime) -> int:
    """All of it, in pieces. `db`: a session that nobody waits for. Returns 0 where another process does it."""
    if not await db.fetchval(sql.CROWD_LOCK):
        return 0
    try:
        await writer.reach(Step.IN_RECHECK)
        await _recompute_each(writer, db, {("root", root): owed_at})
    finally:
        if not db.is_closed():
            await db.execute(sql.CROWD_UNLOCK)
    return 1


async def _recompute_due(writer: Writer, db: Connection, *, age_s: float) -> int:
    owed = {(r[0], r[1]): r[2] for r in await db.fetch(sql.OWED, age_s, OWED_PIECE)}
    for root in await crowded(writer, db, owed.keys()):
        del owed["root", root]
    if owed:
        await writer.reach(Step.IN_RECHECK)
        await _recompute_each(writer, db, owed)
    return len(owed)


async def _recompute_each(writer: Writer, db: Connection, owed: dict[Key, datetime]) -> None:
    """Recompute these; one that fails by itself is put back, with its reason."""
    try:
        with translating():
            await recompute(writer, db, owed, set())
    except (StoreUnavailable, RowRejected) as error:
        if len(owed) > 1:
            for half in halves(sorted(owed.items())):
                await _recompute_each(writer, db, dict(half))
            return
        [(kind, key)] = owed
        await db.execute(sql.OWED_LATER, kind, key, str(error)[:500])
        log.warning("The %s of %s is recomputed later: %s", kind, key, error)
