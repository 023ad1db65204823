"""Floors: "what is older than revision R of this account is superseded", said by who settles a snapshot of it.

A floor is committed before the account is compared. Every transaction that writes records reads floors before its
commit (`look`, `put`): either it sees the floor, and writes nothing that is older, or it had read before the floor was
committed. For those the comparison waits. So whatever is older is in the tables by then, or never will be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from fastworker.errors import StoreUnavailable
from fastworker.store import statements as sql
from fastworker.store.schema_admin import KNOWS_FLOORS
from fastworker.store.session import Connection

LOOK_S: Final = 0.005
WAIT_S: Final = 120.0
"""A session without its client is gone by then, and its transaction with it."""


async def put_floors(db: Connection, floors: Sequence[tuple[str, str, int, bool]]) -> set[str]:
    """Commit them: (DID, rev, seq, lower). Returns the DIDs that have a higher one, where nothing was changed; with
    `lower` that is lowered."""
    refused = set()
    async with db.transaction():
        for floor in sorted(floors):
            if not await db.fetchval(sql.FLOOR_PUT, *floor):
                refused.add(floor[0])
    return refused


async def readers_are_through(db: Connection) -> None:
    """Wait until every transaction has ended that may have read floors before the newest was committed.

    Raises StoreUnavailable when one does not end.
    """
    give_up = time.monotonic() + WAIT_S
    before = await _readers(db)
    while before:
        if time.monotonic() > give_up:
            raise StoreUnavailable(f"PostgreSQL: a flush has been open for {WAIT_S:.0f} s")
        await asyncio.sleep(LOOK_S)
        before &= await _readers(db)


async def _readers(db: Connection) -> set[str]:
    return {row[0] for row in await db.fetch(sql.FLOOR_READERS)}


async def all_know_floors(db: Connection) -> bool:
    """Whether no worker of a release is connected that knows no floors."""
    return not await db.fetchval(sql.WITHOUT_FLOORS, KNOWS_FLOORS)
