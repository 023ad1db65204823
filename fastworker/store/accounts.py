"""What #account and #identity events become, and handles that are resolved beside the stream."""

from __future__ import annotations

from datetime import datetime
from typing import Any

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
        await db.execute(sql.ACCOUNTS_DELETED, *columns(deleted.values()))


async def put_identities(db: Connection, identities: dict[str, list[TimedIdentity]]) -> None:
    """The newest handle that events name; where the newest event names none, the resolver is asked to look it up."""
    rows = []
    unresolved = []
    for did, events in sorted(identities.items()):
        named = [e for e in events if e.event.handle is not None]
        if named:
            newest = _newest(named)
            rows.append((did, newest.event.handle, newest.event.relay, newest.event.seq, newest.at))
        if len(named) < len(events):
            unresolved.append((did, max(e.at for e in events if e.event.handle is None)))
    if rows:
        won = await db.fetch(sql.IDENTITIES, *columns(rows))
        if won:
            await db.execute(sql.HANDLES, *columns(sorted(tuple(r) for r in won)))
    if unresolved:
        await db.execute(sql.IDENTITIES_UNRESOLVED, *columns(unresolved))


def _newest(events: list[Any]) -> Any:
    """The newest of one DID's account or identity events: by seq within one relay, else by time."""

    def beats(a: Any, b: Any) -> bool:
        if a.event.relay == b.event.relay and a.event.seq is not None and b.event.seq is not None:
            return bool(a.event.seq > b.event.seq)
        return bool(a.at > b.at)

    best = events[0]
    for event in events[1:]:
        if beats(event, best):
            best = event
    return best


async def unresolved(db: Connection, limit: int) -> list[tuple[str, datetime]]:
    """(did, marked at) of identities whose handle nobody told, those that may be asked for now."""
    return [(r[0], r[1]) for r in await db.fetch(sql.UNRESOLVED, limit)]


async def resolved(writer: Writer, db: Connection, rows: list[tuple[str, str | None, datetime, datetime]]) -> int:
    """(did, its handle or None, asked at, marked at). Not taken where an event came meanwhile; how many were."""
    if not rows:
        return 0

    async def transaction() -> int:
        async with db.transaction():
            taken = await db.fetch(sql.RESOLVED, *columns(sorted(rows, key=lambda row: row[0])))
            if named := sorted((r[0], r[1]) for r in taken if r[1] is not None):
                await db.execute(sql.HANDLES, *columns(named))
            return len(taken)

    return await writer.retry(transaction)


async def unresolvable(db: Connection, dids: list[str]) -> None:
    """Ask later, ever more rarely: from half a minute to a day."""
    await db.execute(sql.UNRESOLVABLE, sorted(dids))
