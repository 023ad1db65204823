"""What #account and #identity events become, and handles that are resolved beside the stream."""

from __future__ import annotations

from datetime import datetime

from fastworker.crashpoint import Step
from fastworker.store import statements as sql
from fastworker.store.session import Connection
from fastworker.store.writer import Writer, columns
from fastworker.table.batch import TimedAccount, TimedIdentity


async def put_accounts(db: Connection, accounts: dict[str, list[TimedAccount]]) -> None:
    """The newest event of each relay, of these the latest, and the highest deletion, which beats older records.

    Takes the lock of the account's row first: it orders the writers of one account.
    """
    events = [
        (did, e.event.relay or "", e.event.seq, e.at, e.event.active, e.event.status)
        for did, some in sorted(accounts.items())
        for e in some
    ]
    arrays = columns(events)
    await db.execute(sql.ACCOUNTS_LOCK, *arrays)
    await db.execute(sql.ACCOUNT_EVENTS, *arrays)
    await db.execute(sql.ACCOUNTS, sorted(accounts))
    deleted: dict[str, tuple[str, int, datetime]] = {}
    for did, _, seq, at, active, status in events:
        if not active and status == "deleted" and seq:
            before = deleted.get(did, (did, seq, at))
            deleted[did] = (did, max(seq, before[1]), max(at, before[2]))
    if deleted:
        arrays = columns(deleted.values())
        await db.execute(sql.ACCOUNTS_DELETED, *arrays)
        # mutant: a late deletion against a floor
        await db.execute(sql.SETTLE_AGAIN, *arrays)
    if told := [(did, seq) for did, _, seq, _, _, _ in events if seq]:
        await db.execute(sql.REACTIVATED, *columns(told))


async def put_identities(writer: Writer, db: Connection, identities: dict[str, list[TimedIdentity]]) -> None:
    """Handles that events claim, and who shows them now; where the newest event names none, the resolver is asked."""
    claims = []
    unnamed = []
    for did, events in sorted(identities.items()):
        named = [e for e in events if e.event.handle is not None]
        claims += [(did, e.event.handle, e.event.relay or "", e.event.seq, e.at) for e in named]
        if len(named) < len(events):
            unnamed.append((did, max(e.at for e in events if e.event.handle is None)))
    if claims:
        await db.execute(sql.IDENTITIES, *columns(claims), writer.verified_only)
    if unnamed:
        await db.execute(sql.IDENTITIES_UNRESOLVED, *columns(unnamed))
    await writer.reach(Step.HANDLES_DECIDED)


async def unresolved(db: Connection, limit: int) -> list[tuple[str, datetime]]:
    """(did, marked at) of identities without a known handle whose next attempt is due."""
    return [(r[0], r[1]) for r in await db.fetch(sql.UNRESOLVED, limit)]


async def claimed_before(db: Connection, after: str, limit: int) -> tuple[str | None, int]:
    """Queue what a piece of the identities claimed while nobody verified handles: (the piece's last DID, how many)."""
    (piece,) = await db.fetch(sql.CLAIMED_BEFORE, after, limit)
    last, count = piece
    return last, count


async def resolved(writer: Writer, db: Connection, rows: list[tuple[str, str | None, datetime, datetime]]) -> int:
    """Store looked-up handles: (did, handle or None, asked at, marked at). One is left out when a newer event came
    meanwhile. Returns how many were stored."""
    if not rows:
        return 0

    async def transaction() -> int:
        async with db.transaction():
            taken = await db.fetch(sql.RESOLVED, *columns(sorted(rows, key=lambda row: row[0])))
            if named := [r for r in taken if r[1] is not None]:
                dids, before = sorted(r[0] for r in named), [r[2] for r in named if r[2] is not None]
                await db.execute(sql.SHOW_HANDLES, dids, before, writer.verified_only)
            return len(taken)

    return await writer.retry(transaction)


async def unresolvable(db: Connection, dids: list[str]) -> None:
    """Put off the next attempt: half a minute, then longer after each failure, a day at most."""
    await db.execute(sql.UNRESOLVABLE, sorted(dids))
