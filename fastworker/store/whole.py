"""A small flush in one call or two: the steps of store/flush.py inside PostgreSQL, without round trips between them.

Few new rows of the hot tables are one call. If there is more to do, the first call (`first`) commits what comes before
the rows and reads, without locks, what is stored of the batch's records. What has to change is decided here, and the
second call (`put_whole`) writes it if under its locks everything is still as it was read. Otherwise it writes nothing,
and the flush goes step by step.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, NamedTuple

from asyncpg.exceptions import PostgresError

from fastworker.crashpoint import Step
from fastworker.store import statements as sql
from fastworker.store.effects import Owed, gate_arguments, item_arguments, last_arguments, profile_rows
from fastworker.store.flush import FEW_USERS, FloorCame, Plan, Written, finish, first_arguments, pay_owed, put_first
from fastworker.store.joined import keys_of
from fastworker.store.look import back_arguments, lowest, nothing
from fastworker.store.rows import by_table
from fastworker.store.session import Connection
from fastworker.store.settle import change_records, follow, thaw, twin_rows
from fastworker.store.writer import Writer, columns
from fastworker.table import derive
from fastworker.table.batch import Batch, Change, Row
from fastworker.table.derive import Effects
from fastworker.table.pairs import Arrangement, Found, Member, pair_of, rearrange
from fastworker.table.schema import TABLES, Table

_BY_NAME = {table.name: table for table in TABLES}


class Stored(NamedTuple):
    """What `first` read: rows by table, then uri; twins by table, pair and uri; which version of each it is."""

    rows: dict[str, dict[str, Row]]
    twins: dict[str, dict[str, dict[str, Member]]]
    cids: dict[str, str | None]
    seen: list[str]
    read: frozenset[str]
    """Tables of which all that comes was read; of others, where pairs are taken to be free, only what may be there."""


class Decided(NamedTuple):
    """What a small flush writes: arguments of `put_whole`, what follows, and how many rows change."""

    arguments: dict[str, Any]
    effects: Effects
    rows: int
    is_fresh: bool  # no row is replaced: what follows from it may be there
    new: list[str]  # uris that were not read: they must not be among the twins


async def write_whole(writer: Writer, db: Connection, batch: Batch) -> Written | None:
    """None: it goes step by step. Nothing is written then but what is committed before the rows."""
    if not _is_small(writer, batch):
        return None
    changes = sorted(batch.changes.values(), key=lambda c: c.uri)
    try:
        if _is_new(batch) and (written := await _unless_read(_write(writer, db, batch, changes, None))):
            return written
        stored = await _first(writer, db, batch, changes)
        await writer.reach(Step.AFTER_TOMBSTONE_COMMIT)
        if not (changes or batch.progress or writer.unknown(batch.dids)):
            return Written(0, 0, 0)
        return await _unless_read(_write(writer, db, batch, changes, stored))
    except FloorCame:
        return None
    except PostgresError as error:
        if error.sqlstate != sql.LOOK_FIRST:
            raise
        return None


def _is_small(writer: Writer, batch: Batch) -> bool:
    size = len(batch.changes)
    return (
        0 < writer.whole_rows_max >= size
        and bool(size or batch.dids or batch.syncs or batch.progress)
        and size < writer.copying.rows_min
        and len(writer.unknown(batch.dids)) <= FEW_USERS
    )


def _is_new(batch: Batch) -> bool:
    """Whether, as far as this process knows, there are only new rows of hot tables. The routine knows better."""
    return not (batch.accounts or batch.identities or batch.syncs) and all(
        c.row is not None and c.table.hot for c in batch.changes.values()
    )


async def _unless_read(work: Awaitable[Written | None]) -> Written | None:
    """None, too, where the rows are not as the call was told."""
    try:
        return await work
    except PostgresError as error:
        if error.sqlstate not in sql.NOT_AS_READ:
            raise
        return None


async def _first(writer: Writer, db: Connection, batch: Batch, changes: list[Change]) -> Stored:
    """Commit what comes before the rows, and read what is stored of them."""
    arguments = first_arguments(writer, batch, nothing())
    users = writer.unknown(batch.dids) if batch.identities else []
    if batch.identities:  # a handle is shown in a row of users
        arguments |= {"dids": list(batch.dids), "new_users": users or None}
    reading = _reading(changes)
    for name, keys in reading.items():
        arguments |= sql.keys_of_tables(name, keys)
    found = await writer.retry(lambda: put_first(db, arguments))
    writer.remember(users)
    rows = {
        table.name: {row[0]: tuple(row) for row in some}
        for table, some in zip(TABLES, found.values(), strict=False)
        if some
    }
    twins: dict[str, dict[str, dict[str, Member]]] = {}
    for uri, name, pair, rkey, rev, seq, cid, row in found["old_twins"] or ():
        member = Member(rkey, uri, thaw(_BY_NAME[name], row), rev, seq, cid)
        twins.setdefault(name, {}).setdefault(pair, {})[uri] = member
    read = frozenset(_BY_NAME).difference(reading["fresh_uris"]).union(found["taken"] or ())
    return Stored(rows, twins, dict(one.split(" ") for one in found["cids"] or ()), found["seen"] or [], read)


def _reading(changes: list[Change]) -> dict[str, dict[str, list[str]]]:
    """What `first` reads, by argument and table."""
    keys: dict[str, dict[str, list[str]]] = {name: {} for name in sql.KEYS_READ}
    for table, mine in by_table(changes):
        upserts = [(c.uri, pair_of(table, c.row)) for c in mine if c.row is not None] if table.pair else []
        pairs = list(dict.fromkeys(pair for _, pair in upserts))
        # mutant: two of a pair taken to be new
        is_fresh = bool(pairs) and sql.may_be_taken(table) and len(pairs) == len(upserts)
        if is_fresh:
            keys["fresh_uris"][table.name] = [uri for uri, _ in upserts]
        keys["read_uris"][table.name] = [c.uri for c in mine if c.row is None or not is_fresh]
        keys["read_pairs"][table.name] = pairs
    return keys


async def _write(
    writer: Writer, db: Connection, batch: Batch, changes: list[Change], stored: Stored | None
) -> Written | None:
    """`stored`: None where all rows are taken to be new. Returns None where more has to be read than that.

    Raises PostgresError with SQLSTATE `NOT_AS_READ` or `LOOK_FIRST` where nothing was written.
    """
    decided = _all_new(writer, changes) if stored is None else _decide(writer, changes, stored)
    if decided is None:
        return None
    effects = decided.effects
    users = writer.unknown(batch.dids)
    upserts = [c for c in changes if c.row is not None]
    lowest_rev, lowest_seq = lowest(changes)
    owed = set(effects.owed)
    fresh = keys_of(writer, upserts)
    back = back_arguments(writer, upserts, upserts)
    services = [key for kind, key in fresh if kind == "like_count"]
    if back["with_services"]:
        services += [uri for uri in back["like_posts"] if derive.is_liked_service(uri)]
    arguments = {
        "new_users": users or None,
        "fresh": decided.is_fresh,
        **decided.arguments,
        **gate_arguments(effects),
        **item_arguments(writer, effects),
        **last_arguments(writer, effects, batch.progress),
        **{name: None if value == [] else value for name, value in back.items()},
        "new_uris": decided.new,
        "repos": list({c.repo for c in changes}),
        "lowest_rev": lowest_rev,
        "lowest_seq": lowest_seq,
        "dids": list(batch.dids),
        "gates_of": [key for kind, key in fresh if kind == "gate"] or None,
        "services_of": services or None,
        **dict(zip(sql.COUNTED, writer.counted, strict=True)),
    }
    values = [arguments.get(name) for name in sql.WHOLE_ARGUMENTS]
    await writer.reach(Step.BEFORE_MAIN_COMMIT)
    (done,) = await writer.retry(lambda: db.fetch(sql.PUT_WHOLE, *values))
    await writer.reach(Step.AFTER_MAIN_COMMIT)
    writer.remember(users)
    if done["note"] is not None:
        await pay_owed(writer, db, Owed(owed, done["note"], is_owing=False))
    if done["is_late"]:
        return await finish(writer, db, Plan(changes, upserts, nothing()), decided.rows)
    await writer.reach(Step.AFTER_LOOK_BACK)
    return Written(decided.rows, max(0, len(upserts) - decided.rows), 0)


def _all_new(writer: Writer, changes: list[Change]) -> Decided | None:
    """The same where nothing was read: most flushes of a quiet stream. None where two records are of one pair."""
    effects = Effects(writer.derive)
    arguments: dict[str, Any] = {}
    for table, mine in by_table(changes):
        if _is_double(table, mine):
            return None
        derive.add(effects, table, mine)
        arguments["new_" + table.name] = [c.row for c in mine]
    return Decided(arguments, effects, len(changes), is_fresh=True, new=[c.uri for c in changes])


def _decide(writer: Writer, changes: list[Change], stored: Stored) -> Decided | None:
    """What has to change, if everything is as it was read. None where one of two new records of a pair that was not
    read has to wait; or where a record was read in two places."""
    effects = Effects(writer.derive)
    arguments: dict[str, Any] = {}
    no_twins: list[str] = []
    new_twins: list[Row] = []
    new: list[str] = []
    keys: dict[str, dict[str, list[str]]] = {name: {} for name in sql.KEYS_CHANGED}
    count = 0
    is_fresh = True
    for table, mine in by_table(changes):
        have, twins = stored.rows.get(table.name, {}), stored.twins.get(table.name, {})
        unread: set[str] = {c.uri for c in mine if c.row is not None and table.hot}
        pairs: list[str] = []
        if table.pair and (have or twins or table.name in stored.read):
            if any(not have.keys().isdisjoint(members) for members in twins.values()):
                return None  # a record in two places, to be settled under its locks
            arrangement = _arrange(writer, table, mine, stored)
            unread, pairs = _not_read(table, mine, stored, arrangement)
            if any(members for pair, members in arrangement.twin_puts.items() if pair not in pairs):
                return None
            follow(table, effects, arrangement)
            updates = [member.row for _, member in arrangement.updates]
            deletes = {row[0] for row in arrangement.deletes}
            inserts = [member.row for _, member in arrangement.inserts]
            for _, member in arrangement.inserts:
                derive.added(effects, table, member.row, member.cid)
            no_twins += arrangement.twin_deletes
            # mutant: two of a pair in a small flush
            new_twins += twin_rows(table, arrangement)
        else:
            if _is_double(table, mine):
                return None
            updates, gone, missing = change_records(writer, table, {c.uri: c for c in mine}, have, effects)
            derive.add(effects, table, missing)
            deletes, inserts = set(gone), [c.row for c in missing if c.row is not None]
        count += len(updates) + len(deletes) + len(inserts)
        is_fresh = is_fresh and not updates
        new += sorted(unread)
        there = (have.keys() | {c.uri for c in mine}) - (unread - have.keys())
        for name, values in zip(sql.KEYS_CHANGED, (there, deletes, pairs), strict=True):
            keys[name][table.name] = sorted(values)
        short = table.name.rpartition(".")[2]
        if table.hot:
            arguments |= {"set_" + short: updates or None, "new_" + short: inserts or None}
        else:
            arguments["new_" + short] = [*updates, *inserts] or None
    for name in sql.KEYS_CHANGED:
        arguments |= sql.keys_of_tables(name, keys[name])
    if "read_uris" in arguments:
        arguments |= {"seen": stored.seen, "no_twins": sorted(no_twins) or None}
        arguments["new_twins"] = sorted(new_twins) or None
    if gated := [(c.uri, c.rev, c.seq, c.cid, c.row is None) for c in changes if not c.table.hot]:
        arguments.update(zip(sql.GATED, columns(gated), strict=True))
    arguments["user_profiles"] = profile_rows(effects) or None
    arguments["label_events"] = sorted(effects.labels_added) or None
    return Decided(arguments, effects, count, is_fresh, new)


def _is_double(table: Table, changes: list[Change]) -> bool:
    """Whether two of these records want one place."""
    wanted = [pair_of(table, c.row) for c in changes if c.row is not None] if table.pair else []
    # mutant: two new records of a pair
    return len(set(wanted)) < len(wanted)


def _not_read(
    table: Table, changes: list[Change], stored: Stored, arrangement: Arrangement
) -> tuple[set[str], list[str]]:
    """Which uris are taken to be new, and the pairs that were read."""
    if table.name in stored.read:
        return set(), list(arrangement.members)
    known = {pair_of(table, row) for row in stored.rows.get(table.name, {}).values()}
    known.update(stored.twins.get(table.name, ()))
    unread = {c.uri for c in changes if c.row is not None and pair_of(table, c.row) not in known}
    return unread, sorted(known)


def _arrange(writer: Writer, table: Table, changes: list[Change], stored: Stored) -> Arrangement:
    """The same as `settle` does under the locks."""
    have, twins = stored.rows.get(table.name, {}), stored.twins.get(table.name, {})
    winners = {pair_of(table, row): row for row in have.values()}
    homes: dict[str, list[str]] = {uri: [pair_of(table, row)] for uri, row in have.items()}
    for pair, members in twins.items():
        homes.update((uri, [pair]) for uri in members)
    # What is not there has not to be deleted: the tombstone stands.
    pending = {c.uri: c for c in changes if c.row is not None or c.uri in homes}
    pairs = {pair_of(table, c.row) for c in changes if c.row is not None}.union(winners, twins)
    found = Found(winners, twins, homes, stored.cids)
    return rearrange(table, pending, pairs, found, writer.trusted, many_relays=writer.many_relays)
