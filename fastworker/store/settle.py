"""Changes of rows that exist: updates, deletes, and records that meet another one of their unique pair.

Everything here works under the locks of the rows that are there, taken in the order of their keys. What another writer
changed while we waited for a lock stays in `pending` and is looked at again in the next round. Where there is a list of
what comes `later`, rows that another writer has locked are not waited for: their changes go there, pair by pair.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import orjson

from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.store import statements as sql
from fastworker.store.rows import Pending, by_table, divide
from fastworker.store.session import Connection, Contended, RowsKept
from fastworker.store.writer import Writer, columns
from fastworker.table import derive
from fastworker.table.batch import Change, Row, replaces, seq_of, stored_version
from fastworker.table.derive import Effects
from fastworker.table.pairs import Arrangement, Found, Member, pair_of, rearrange
from fastworker.table.rows import FEED_ITEM, NOTIFICATION
from fastworker.table.schema import PROFILES, Table

ROUNDS_MAX = 100  # of one conflict: each round means that another writer committed in between


async def settle_existing(
    writer: Writer,
    db: Connection,
    existing: list[tuple[Table, Pending]],
    waiting: set[str],
    effects: Effects,
    later: list[Change] | None = None,
) -> int:
    """Hot tables: what `insert_new` left. Returns rows changed.

    Locks the stored rows (and, for pairs, the winner's row) before it compares versions, so that a change is never
    judged by a row that somebody else is replacing.
    """
    rows = 0
    for table, pending in existing:
        await _drop_superseded(writer, db, table, pending, waiting)
        rows += await settle(writer, db, table, pending, effects, later)
    return rows


async def settle_cold(
    writer: Writer, db: Connection, changes: list[Change], waiting: set[str], effects: Effects
) -> int:
    """Cold tables, new rows and existing ones. Returns rows changed.

    Their versions are in fastworker.versions: that row is the gate, whose lock orders all writers of a record until
    they commit. Only what the gate finds to be the newest is written.

    The gate does not keep the writer of another record from moving a row among the twins. Then the row is gone, and the
    insert succeeds: so twins are looked at after it, too.
    """
    if not changes:
        return 0
    gate = await db.fetch(sql.GATE, *columns([(c.uri, c.rev, c.seq, c.cid, c.row is None) for c in changes]))
    # mutant: cold gate open
    newest = {r[0] for r in gate}
    changes = [c for c in changes if c.uri in newest]
    pairs = [c.uri for c in changes if c.table.pair and c.row is not None]
    if pairs:
        waiting = waiting.union(r[0] for r in await db.fetch(sql.AMONG_TWINS, pairs))
    rows = 0
    for table, mine in by_table(changes):
        new, pending = divide(mine, waiting)
        if new:
            placed = {r[0] for r in await db.fetch(sql.insert(table), [c.row for c in new])}
            # mutant: a cold record becomes a twin meanwhile
            if table.pair and await db.fetch(sql.AMONG_TWINS, sorted(placed)):
                raise Contended(f"{table.name}: another writer put a record among the twins")
            derive.add(effects, table, [c for c in new if c.uri in placed])
            pending.update((c.uri, c) for c in new if c.uri not in placed)
            rows += len(placed)
        rows += await settle(writer, db, table, pending, effects)
    return rows


async def settle(
    writer: Writer,
    db: Connection,
    table: Table,
    pending: Pending,
    effects: Effects,
    later: list[Change] | None = None,
) -> int:
    """Work off `pending`, in as many rounds as other writers make necessary. Returns rows changed.

    `later`: takes what another writer's locks stand in the way of; None: wait for them. A cold table's change cannot
    come later: its gate has been passed by then.
    Raises StoreUnavailable after `ROUNDS_MAX` of them.
    """
    once = _settle_pairs if table.pair else _settle_records
    rows = 0
    for _ in range(ROUNDS_MAX):
        if not pending:
            return rows
        rows += await once(writer, db, table, pending, effects, later)
    # A unique index that is not ours refuses one without a word: this names it.
    left = [change.row for change in pending.values() if change.row is not None]
    if left and not await db.fetch(sql.insert(table, or_nothing=False), left[:1]):
        raise RowRejected(f"{table.name}: a trigger or a rule of this database keeps rows away without an error")
    raise StoreUnavailable(f"{table.name}: {len(pending)} rows were still contended after {ROUNDS_MAX} rounds")


async def _drop_superseded(writer: Writer, db: Connection, table: Table, pending: Pending, waiting: set[str]) -> None:
    """Forget upserts whose stored row is not older: most are delivered again, and need no lock.

    Not those that are among the twins as well: whichever of the two is older has to go.
    """
    upserts = [uri for uri, c in pending.items() if c.row is not None and uri not in waiting]
    if upserts:
        for uri, rev, seq in await db.fetch(sql.versions_of(table), upserts):
            change = pending[uri]
            if not replaces(change, rev, seq_of(seq), many_relays=writer.many_relays):
                del pending[uri]


# Records without pairs ------------------------------------------------------------------------------


async def _settle_records(
    writer: Writer,
    db: Connection,
    table: Table,
    pending: Pending,
    effects: Effects,
    later: list[Change] | None,
) -> int:
    """Updates and deletes of rows that exist, under their locks. What vanished meanwhile is inserted or stays."""
    stored = {r[0]: tuple(r) for r in await db.fetch(sql.lock(table, free=later is not None), sorted(pending))}
    if later is not None and (missing := sorted(pending.keys() - stored)):
        later += [pending.pop(r[0]) for r in await db.fetch(sql.present(table), missing)]
    updates, deletes, again = change_records(writer, table, pending, stored, effects)
    if updates:
        await _all(db, table, sql.update(table), updates)
    if deletes:
        await _all(db, table, sql.delete(table), deletes)
    inserted = 0
    if again:
        for row in await db.fetch(sql.insert(table), [c.row for c in again]):
            change = pending.pop(row[0])
            derive.added(effects, table, change.row, change.cid)  # type: ignore[arg-type]
            inserted += 1
    return len(updates) + len(deletes) + inserted


async def _all(db: Connection, table: Table, statement: str, values: list[Any]) -> None:
    """Change these rows, which are there and locked.

    Raises RowsKept where a trigger or a rule keeps one as it is, without an error: a delete would be acknowledged.
    """
    done: str = await db.execute(statement, values)
    # mutant: rows that a trigger keeps
    if done.rpartition(" ")[2] != str(len(values)):
        raise RowsKept(
            f"{table.name}: a trigger or a rule of this database keeps rows as they are, without an error. It has to "
            "let them change, or to be dropped"
        )


class Changed(NamedTuple):
    """What becomes of changes of a table without pairs."""

    updates: list[Row]
    deletes: list[str]
    missing: list[Change]  # upserts of what is not there


def change_records(writer: Writer, table: Table, pending: Pending, stored: dict[str, Row], effects: Effects) -> Changed:
    """Take from `pending` what `stored` rows decide, and collect what follows from it. What is missing stays there."""
    result = Changed([], [], [])
    for uri, change in list(pending.items()):
        old = stored.get(uri)
        if old is None:
            if change.row is None:
                del pending[uri]  # nothing to delete: the tombstone stands
                if table is PROFILES and change.rkey == "self":
                    effects.profiles[change.repo] = None  # what another writer may have put into users
            else:
                result.missing.append(change)
            continue
        del pending[uri]
        version = stored_version(table, old)
        if table.hot and not replaces(change, *version, many_relays=writer.many_relays):
            continue
        derive.removed(effects, table, old, counted=not table.hot or version != (None, None))
        if change.row is None:
            # mutant: deletes ignored
            result.deletes.append(uri)
        else:
            derive.added(effects, table, change.row, change.cid)
            result.updates.append(change.row)
    return result


# Unique pairs ---------------------------------------------------------------------------------------


async def _settle_pairs(
    writer: Writer,
    db: Connection,
    table: Table,
    pending: Pending,
    effects: Effects,
    later: list[Change] | None,
) -> int:
    """One round: find the members of each pair under the lock of its winner's row, then say who is in the table.

    Whoever changes the members of a pair holds its winner's row; where a pair has no winner, the unique index decides,
    and the loser comes back in the next round. Returns rows changed; 0 with `pending` left: look again.
    """
    located = await db.fetch(sql.locate(table), sorted(pending))
    homes: dict[str, list[str]] = {}  # two of them if a record changed its pair on the way
    for r in located:
        homes.setdefault(r[0], []).append(r[1])
    for uri in [u for u, c in pending.items() if c.row is None and u not in homes]:
        del pending[uri]  # nothing to delete: the tombstone stands
    if not pending:
        return 0
    wanted = {pair_of(table, c.row) for c in pending.values() if c.row is not None}
    pairs = wanted.union(pair for uri in pending for pair in homes.get(uri, ()))
    winners = await _lock_winners(db, table, pairs, located, free=later is not None)
    if isinstance(winners, set):
        if later is not None and winners:
            await _put_off(db, table, pending, homes, winners, later)
        return 0
    twins: dict[str, dict[str, Member]] = {}
    for r in await db.fetch(sql.TWINS, table.name, list(pairs)):
        twins.setdefault(r[1], {})[r[0]] = Member(r[2], r[0], thaw(table, r[6]), r[3], r[4], r[5])
    for r in located:  # what moved between table and twins since, or into another pair: look again
        held = winners.get(r[1])
        if (held is None or held[0] != r[0]) if r[2] else r[0] not in twins.get(r[1], ()):
            return 0
    if not winners.keys() <= pairs or (table.hot and await _take_in_strays(db, table, pending, twins)):
        return 0
    displaced = [row[0] for pair, row in winners.items() if pair in wanted]
    found = Found(winners, twins, homes, await cids_of(db, table, displaced, effects))
    return await _write(
        db,
        table,
        pending,
        effects,
        found,
        rearrange(table, pending, pairs, found, writer.trusted, many_relays=writer.many_relays),
    )


async def _lock_winners(
    db: Connection, table: Table, pairs: set[str], located: list[Any], *, free: bool
) -> dict[str, Row] | set[str]:
    """The rows that hold the pairs, by pair, locked; or the uris of those that vanished while we waited for them, or,
    where only those are taken that are `free`, that others have locked."""
    holders = {r[0] for r in located if r[2]}
    if others := pairs.difference(r[1] for r in located if r[2]):
        found = await db.fetch(sql.winners(table), *columns(pair.split("\n") for pair in others))
        holders.update(r[0] for r in found)
    stored = {r[0]: tuple(r) for r in await db.fetch(sql.lock(table, free=free), sorted(holders))}
    return holders.difference(stored) or {pair_of(table, row): row for row in stored.values()}


async def _put_off(
    db: Connection, table: Table, pending: Pending, homes: dict[str, list[str]], busy: set[str], later: list[Change]
) -> None:
    """Move from `pending` what is about the pairs of these rows. Those that vanished meanwhile hold up nothing."""
    held = {r[1] for r in await db.fetch(sql.locate(table), sorted(busy)) if r[2]}
    for uri, change in list(pending.items()):
        wanted = [] if change.row is None else [pair_of(table, change.row)]
        if not held.isdisjoint((*homes.get(uri, ()), *wanted)):
            later.append(pending.pop(uri))


async def _take_in_strays(db: Connection, table: Table, pending: Pending, twins: dict[str, dict[str, Member]]) -> bool:
    """A twin whose record is in the table too, with another pair, cannot be promoted: it is settled with the rest.

    Adds them to `pending`; whether there were any.
    """
    members = {uri: member for those in twins.values() for uri, member in those.items()}
    strays = members.keys() - pending.keys()
    if not strays:
        return False
    for r in await db.fetch(sql.versions_of(table), sorted(strays)):
        twin = members[r[0]]
        pending[r[0]] = Change(table, r[0], derive.did_of(r[0]), twin.rkey, twin.rev, twin.seq, 0, twin.cid, twin.row)
    return bool(pending.keys() & strays)


async def cids_of(db: Connection, table: Table, uris: list[str], effects: Effects) -> dict[str, str | None]:
    """CIDs of rows that do not carry their own, from the derived rows that need them, written or about to be."""
    statement = sql.CIDS.get(table.name)
    if statement is None or not uris:
        return {}
    reposts = table.name == "reposts"
    keys = uris if reposts else [uri + "#notification" for uri in uris]
    cids: dict[str, str | None] = {r[0]: r[1] for r in await db.fetch(statement, keys)}
    for uri, key in zip(uris, keys, strict=True):
        if (row := (effects.feed_added if reposts else effects.notes_added).get(key)) is not None:
            cids[uri] = row[FEED_ITEM.cid if reposts else NOTIFICATION.cid]
    return cids


async def _write(
    db: Connection, table: Table, pending: Pending, effects: Effects, found: Found, new: Arrangement
) -> int:
    """Make table and twins say what `new` says. Returns how many changes are settled by it."""
    follow(table, effects, new)
    if new.deletes:
        await _all(db, table, sql.delete(table), sorted(row[0] for row in new.deletes))
    if new.twin_deletes:
        await db.execute(sql.TWINS_DELETE, sorted(new.twin_deletes))
    if new.updates:
        await _all(db, table, sql.update(table), [member.row for _, member in new.updates])
    if new.inserts:
        placed = {r[0] for r in await db.fetch(sql.insert(table), [member.row for _, member in new.inserts])}
        for pair, member in new.inserts:
            if member.uri in placed:
                derive.added(effects, table, member.row, member.cid)
            elif pair in found.winners:
                raise Contended(f"{table.name}: another writer put {member.uri} elsewhere")
            else:
                new.refused(pair)
    puts = twin_rows(table, new)
    # mutant: twins never stored
    if puts:
        await db.execute(sql.TWINS_PUT, puts)
    for uri in new.applied:
        del pending[uri]
    return len(new.applied)


def follow(table: Table, effects: Effects, new: Arrangement) -> None:
    """What follows from winners that leave or stay; from new ones where they are inserted."""

    def left(row: Row) -> None:
        derive.removed(effects, table, row, counted=not table.hot or stored_version(table, row) != (None, None))

    for row in new.deletes:
        left(row)
    for old, member in new.updates:
        left(old)
        derive.added(effects, table, member.row, member.cid)
    for row in new.recounts:
        effects.recount.update(derive.subjects(table, row))


def twin_rows(table: Table, new: Arrangement) -> list[Row]:
    """Rows of fastworker.twins for those that wait from now on."""
    puts = sorted(((m, pair) for pair, members in new.twin_puts.items() for m in members), key=lambda put: put[0].uri)
    return [(m.uri, table.name, pair, m.rkey, m.rev, m.seq, m.cid, freeze(m.row)) for m, pair in puts]


def freeze(row: Row) -> str:
    """A row as fastworker.twins keeps it (JSON)."""
    return orjson.dumps(row).decode()


def thaw(table: Table, text: str) -> Row:
    """The opposite of `freeze`."""
    values = orjson.loads(text)
    return tuple(
        datetime.fromisoformat(value) if kind == "timestamp" and value is not None else value
        for kind, value in zip(table.types, values, strict=True)
    )
