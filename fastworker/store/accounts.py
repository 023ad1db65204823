"""What #account and #identity events become, and handles that are resolved beside the stream."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from fastworker.store import statements as sql
from fastworker.store.session import Connection
from fastworker.store.writer import Writer, columns
from fastworker.table.batch import TimedAccount, TimedIdentity


def account_arguments(accounts: dict[str, list[TimedAccount]]) -> dict[str, Any]:
    """Arguments of `fastworker.first`: #account events, and of each account the highest deletion.

    The newest event of each relay is kept, of these the latest counts; a deletion beats older records. The lock of the
    account's row, which is taken first, orders the writers of one account.
    """
    events = [
        (did, e.event.relay or "", e.event.seq, e.at, e.event.active, e.event.status)
        for did, some in sorted(accounts.items())
        for e in some
    ]
    deleted: dict[str, tuple[str, int, datetime]] = {}
    for did, _, seq, at, active, status in events:
        if not active and status == "deleted" and seq:
            before = deleted.get(did, (did, seq, at))
            deleted[did] = (did, max(seq, before[1]), max(at, before[2]))
    told = [(did, seq) for did, _, seq, _, _, _ in events if seq]
    return _named(sql.ACCOUNT, events) | _named(sql.DELETION, deleted.values()) | _named(sql.TOLD, told)


def identity_arguments(writer: Writer, identities: dict[str, list[TimedIdentity]]) -> dict[str, Any]:
    """Arguments of `fastworker.first`: handles that events claim, and who shows them then; where the newest event names
    none, the resolver is asked."""
    claims = []
    unnamed = []
    for did, events in sorted(identities.items()):
        named = [e for e in events if e.event.handle is not None]
        claims += [(did, e.event.handle, e.event.relay or "", e.event.seq, e.at) for e in named]
        if len(named) < len(events):
            unnamed.append((did, max(e.at for e in events if e.event.handle is None)))
    return _named(sql.CLAIM[:-1], claims) | _named(sql.UNNAMED, unnamed) | {"only_verified": writer.verified_only}


def _named(names: tuple[str, ...], rows: Collection[tuple[Any, ...]]) -> dict[str, Any]:
    """An array for each column; nothing where there are no rows."""
    return dict(zip(names, columns(rows), strict=True)) if rows else {}


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
