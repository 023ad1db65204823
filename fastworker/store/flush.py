"""One flush: a batch becomes committed rows. Read top to bottom; docs/invariants.md has the proof.

1. look: what tombstones and deleted accounts beat already is not written;
2. commit first: tombstones of this batch's deletes, new users, accounts, identities, in a transaction of their own;
3. the main transaction: new rows, existing rows, the cold tables, then everything that follows from them;
4. look back: what overtook us between 1 and 3 is removed in the same way;
5. recompute the rows that join two records, now that this side has committed.

A flush of few new rows does all of it with one call (store/whole.py). The caller acks after `write` returns. Every step
may be repeated: a crash anywhere means that the entries are delivered again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from asyncpg.exceptions import PostgresError

from fastworker.crashpoint import Step
from fastworker.store import statements as sql
from fastworker.store.accounts import account_arguments, identity_arguments
from fastworker.store.debts import pay
from fastworker.store.effects import Owed, write_effects, write_items
from fastworker.store.joined import NEVER, recompute_joined, recompute_or_owe
from fastworker.store.look import Seen, look, look_back, lowest
from fastworker.store.rows import insert_new
from fastworker.store.session import Connection
from fastworker.store.settle import settle_cold, settle_existing
from fastworker.store.writer import SMALL_FLUSH, Writer, columns
from fastworker.table.batch import Batch, Change, Progress
from fastworker.table.derive import Effects

USERS_AT_ONCE = 200  # so many new users are one transaction: who makes one of them as well waits for no more than that
FEW_USERS = 50  # new users of a small flush are inserted with its rows; more would make other writers wait too long


class FloorCame(Exception):
    """A snapshot's floor was committed since the look of this flush: nothing of this transaction is written."""


class Written(NamedTuple):
    """What a flush did: rows inserted, changed or removed in the primary tables; ops that were not the newest.

    `beaten`: uris of upserts that a tombstone, a deleted account or a floor had beaten.
    """

    rows: int
    superseded: int
    forbidden: int
    beaten: frozenset[str] = frozenset()


class Plan(NamedTuple):
    """What is to be done with a batch, after the first look."""

    changes: list[Change]  # to write: those that may be stored, with deletes instead of what is beaten
    upserts: list[Change]  # those that may be stored, beaten or not
    seen: Seen


class First(NamedTuple):
    """What was committed before the rows. Of the users that this process does not know `early` are committed, `users`
    are so few that they go with the rows. `is_durable`: it is on disk; else the flush must not end without a later
    commit that is."""

    early: Sequence[str]
    users: Sequence[str]
    is_durable: bool


async def write(writer: Writer, db: Connection, batch: Batch) -> Written:
    """Raises StoreUnavailable (write the same batch again later) or RowRejected (write it in halves)."""
    while True:
        try:
            return await _write(writer, db, batch)
        except FloorCame:  # what it supersedes is known at the next look
            continue


async def _write(writer: Writer, db: Connection, batch: Batch) -> Written:
    plan = await _plan(db, batch)
    await writer.reach(Step.LOOKED)
    first = await commit_first(writer, db, batch, plan)
    rows = await write_rows(
        writer, db, plan.changes, plan.seen.waiting, progress=batch.progress, users=first.users, looked=plan.seen
    )
    # mutant: users that no later commit makes durable
    if not (first.is_durable or rows or batch.progress):
        await db.execute(sql.DURABLE)
    writer.remember(first.early)
    forbidden = len(batch.changes) - len(plan.changes) - len(plan.seen.superseded)
    return await finish(writer, db, plan, rows, forbidden=forbidden)


async def note_relays(writer: Writer, db: Connection, batch: Batch) -> None:
    """Commit which relays there are, before anything is looked up: what a deletion beats depends on them."""
    if hosts := batch.relays - writer.relays:
        await writer.retry(lambda: db.execute(sql.RELAYS, sorted(hosts)))
        writer.relays |= hosts
        row = await db.fetchrow(sql.ENTRY_RULES)
        # mutant: the gate of many relays
        writer.many_relays = row is not None and row["many_relays"]


async def _plan(db: Connection, batch: Batch) -> Plan:
    seen = await look(db, batch.changes.values(), batch.dids)
    beaten, forbidden, superseded = seen.beaten, seen.forbidden, seen.superseded
    current = [c for c in batch.changes.values() if c.uri not in superseded] if superseded else batch.changes.values()
    upserts = [c for c in current if c.row is not None]
    if forbidden:
        upserts = [c for c in upserts if c.repo not in forbidden]
        beaten = {uri: delete for uri, delete in beaten.items() if delete.repo not in forbidden}
    # mutant: opt-out ignored
    changes = [beaten.get(c.uri, c) for c in current if c.row is None or c.repo not in forbidden]
    return Plan(changes, upserts, seen._replace(beaten=beaten))


async def commit_first(writer: Writer, db: Connection, batch: Batch, plan: Plan) -> First:
    """Commit what others must see before our rows: users, tombstones, accounts, identities, repairs.

    A tombstone that is committed before the delete is what a late create of another writer finds when it looks back.
    Locks are taken in the order of their keys.
    """
    forbidden = plan.seen.forbidden
    arguments = first_arguments(writer, batch, plan.seen)
    users = writer.unknown(did for did in batch.dids if did not in forbidden)

    async def transaction() -> None:
        async with db.transaction():
            await put_first(db, arguments)
            await writer.reach(Step.HANDLES_DECIDED)

    more = not arguments.keys() <= set(sql.TOMBSTONE)
    is_first = more or len(users) > FEW_USERS or not 0 < len(plan.changes) <= SMALL_FLUSH
    if users and is_first:
        # mutant: all new users at once
        size = USERS_AT_ONCE
        for at in range(0, len(users), size):
            await writer.retry(partial(db.execute, sql.USERS_FIRST, users[at : at + size]))
    if sql.CLAIM[-1] in arguments:
        await writer.retry(transaction)
    elif arguments:
        await writer.retry(lambda: put_first(db, arguments))
    await writer.reach(Step.AFTER_TOMBSTONE_COMMIT)
    is_durable = any(names[0] in arguments for names in (sql.TOMBSTONE, sql.ACCOUNT, sql.REPAIR))
    return First(users, [], is_durable or not users) if is_first else First([], users, is_durable=True)


def first_arguments(writer: Writer, batch: Batch, seen: Seen) -> dict[str, Any]:
    """Arguments of `fastworker.first`; none where there is nothing to commit before the rows."""
    arguments: dict[str, Any] = {}
    tombstones = sorted(
        (
            (c.uri, c.rev, c.seq)
            for c in batch.changes.values()
            if c.row is None and c.table.hot and c.uri not in seen.superseded
        ),
        key=lambda t: t[0],
    )
    # mutant: tombstones not written
    if tombstones:
        arguments.update(zip(sql.TOMBSTONE, columns(tombstones), strict=True))
    if batch.accounts:
        arguments |= account_arguments(batch.accounts)
    # mutant: opt-out of identities ignored
    identities = {did: events for did, events in batch.identities.items() if did not in seen.forbidden}
    if identities:
        arguments |= identity_arguments(writer, identities)
    if batch.syncs:
        newest = {s.did: s for s in sorted(batch.syncs, key=lambda s: (s.rev or "", s.seq or 0))}
        repairs = [(s.did, s.rev, s.seq) for _, s in sorted(newest.items())]
        arguments.update(zip(sql.REPAIR, columns(repairs), strict=True))
    return arguments


async def put_first(db: Connection, arguments: dict[str, Any]) -> Any:
    """The routine `first` with these arguments; what it read."""
    return await db.fetchrow(sql.FIRST, *(arguments.get(name) for name in sql.FIRST_ARGUMENTS))


async def write_rows(
    writer: Writer,
    db: Connection,
    changes: list[Change],
    waiting: set[str],
    *,
    progress: Progress | None = None,
    users: Sequence[str] = (),
    looked: Seen | None = None,
) -> int:
    """The main transaction, begun again where another writer came first. Returns how many rows changed.

    What it leaves owed, counters and joined rows, is paid after its commit. `looked`: what the first look found; None
    where floors do not matter, because rows are removed for what is known already. Raises FloorCame.

    Changes of rows that another flush has locked come later, in transactions of their own, in which nothing else is
    held meanwhile. Only the last of these waits.
    """
    rows = 0
    for pause_s in (*writer.later_s, None):
        if not changes and progress is None:
            break
        later: list[Change] | None = [] if pause_s is not None else None
        work = partial(_main_transaction, writer, db, changes, waiting, progress, users, looked, later)
        changed, owed = await writer.retry(work)
        rows += changed
        writer.remember(users)
        writer.copying.committed()
        await pay_owed(writer, db, owed)
        await writer.reach(Step.OWED_RECOMPUTED)
        # mutant: what is locked is forgotten
        changes, progress, users = later or [], None, ()
        if changes and pause_s:
            await asyncio.sleep(pause_s)
    return rows


async def pay_owed(writer: Writer, db: Connection, owed: Owed) -> None:
    """After the commit that left it owed: both sides of a join can be seen."""
    # mutant: counters are not paid after the commit
    if owed.is_owing:
        await pay(writer, db)
    if owed.joined:
        await recompute_or_owe(writer, db, dict.fromkeys(owed.joined, NEVER), set(), note=owed.note)


async def _main_transaction(
    writer: Writer,
    db: Connection,
    changes: list[Change],
    waiting: set[str],
    progress: Progress | None,
    users: Sequence[str],
    looked: Seen | None,
    later: list[Change] | None,
) -> tuple[int, Owed]:
    effects = Effects(writer.derive)
    if later is not None:
        later.clear()  # of an attempt that was begun again
    try:
        async with db.transaction():
            if users:
                await db.execute(sql.USERS, users)
            rows = await put_rows(writer, db, changes, waiting, effects, later)
            await writer.reach(Step.ROWS_WRITTEN)
            owed = await write_effects(writer, db, effects, progress, _floors(changes, looked))
            await writer.reach(Step.BEFORE_MAIN_COMMIT)
    except PostgresError as error:
        if error.sqlstate == sql.FLOOR_CAME:
            raise FloorCame from error
        raise
    await writer.reach(Step.AFTER_MAIN_COMMIT)
    return rows, owed


def _floors(changes: list[Change], looked: Seen | None) -> dict[str, Any]:
    """What `fastworker.put` is to know, so that a floor that came since the look is seen before the commit."""
    if looked is None or not changes:
        return {}
    if looked.floors is None:
        return {"floors": False}
    rev, seq = lowest(changes)
    known = [f"{did} {floor_rev} {floor_seq}" for did, (floor_rev, floor_seq) in looked.floors.items()]
    repos = list({c.repo for c in changes})
    return {"floors": True, "repos": repos, "lowest_rev": rev, "lowest_seq": seq, "known_floors": known}


async def put_rows(
    writer: Writer,
    db: Connection,
    changes: list[Change],
    waiting: set[str],
    effects: Effects,
    later: list[Change] | None = None,
) -> int:
    """The primary rows, inside the main transaction; `effects` collects what follows. Returns how many rows changed.

    `later`: takes changes of rows that another flush has locked; None: wait for it.

    In this order, so that locks that other writers may wait for are taken as late as can be.
    """
    hot: list[Change] = []
    cold: list[Change] = []
    # mutant: unsorted rows
    for change in sorted(changes, key=lambda c: c.uri):
        (hot if change.table.hot else cold).append(change)
    is_large = len(changes) > SMALL_FLUSH
    rows, existing = await insert_new(writer, db, hot, waiting, effects)
    if is_large and (existing or cold):
        await write_items(writer, db, effects)
    rows += await settle_existing(writer, db, existing, waiting, effects, later)
    if is_large and existing and cold:
        await write_items(writer, db, effects)
    return rows + await settle_cold(writer, db, cold, waiting, effects)


async def finish(writer: Writer, db: Connection, plan: Plan, rows: int, *, forbidden: int = 0) -> Written:
    """Look back, remove what overtook the rows between look and commit, then recompute what joins two records."""
    upserts, beaten = plan.upserts, plan.seen.beaten
    superseded = max(0, len(upserts) - len(beaten) - rows)
    # Upserts that changed nothing are looked at too: an earlier delivery may have died right here.
    # A record among the twins may by now be in the table as well, with another pair: settle it again.
    written = [c for c in upserts if c.uri not in beaten]
    back = await look_back(writer, db, written, upserts)
    overtaken = back.beaten
    # mutant: no look back
    if overtaken or back.waiting:
        again = [overtaken.get(c.uri, c) for c in written if c.uri in overtaken or c.uri in back.waiting]
        rows += await write_rows(writer, db, again, back.waiting, looked=plan.seen)
        back = await look_back(writer, db, written, upserts)
    await writer.reach(Step.AFTER_LOOK_BACK)
    # mutant: joined rows never recomputed
    await recompute_joined(writer, db, upserts, back.joined)
    older = plan.seen.superseded
    count = superseded + len(beaten) + len(overtaken) + len(older)
    return Written(rows, count, forbidden, frozenset((*beaten, *overtaken, *older)))
