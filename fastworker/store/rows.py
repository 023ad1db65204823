"""New rows of the hot tables: few as arrays with one call for all tables, many of one table by COPY."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from asyncpg.exceptions import UniqueViolationError

from fastworker.errors import RowRejected
from fastworker.store import statements as sql
from fastworker.store.session import Connection, Contended
from fastworker.store.writer import Writer
from fastworker.table import derive
from fastworker.table.batch import Change
from fastworker.table.derive import Effects
from fastworker.table.schema import TABLES, Table

Pending = dict[str, Change]  # by uri: changes that depend on a row that exists


async def insert_new(
    writer: Writer, db: Connection, changes: list[Change], waiting: set[str], effects: Effects
) -> tuple[int, list[tuple[Table, Pending]]]:
    """Insert the upserts that nothing stands in the way of. First in the main transaction; `changes` sorted by uri.

    Returns how many rows are new, and by table what is left: upserts that were refused or are among the twins
    (`waiting`), and deletes. Locks only the keys that it inserts. A refused row is not an error: the unique index has
    decided, and `settle_existing` works it out under the lock of the row that is there.
    """
    rows = 0
    existing: list[tuple[Table, Pending]] = []
    few: list[tuple[Table, list[Change], Pending]] = []
    for table, mine in by_table(changes):
        new, pending = divide(mine, waiting)
        existing.append((table, pending))
        if writer.copying.may(len(new)):
            fresh, taken = await _copy_new(writer, db, table, new)
            pending.update((c.uri, c) for c in taken)
            derive.add(effects, table, fresh)
            rows += len(fresh)
        elif new:
            few.append((table, new, pending))
    if few:
        found = (await put(db, {"new_" + table.name: [c.row for c in new] for table, new, _ in few}))["placed"]
        placed = None if found is None else set(found)
        for table, new, pending in few:
            fresh = new if placed is None else [c for c in new if c.uri in placed]
            if placed is not None:
                pending.update((c.uri, c) for c in new if c.uri not in placed)
            derive.add(effects, table, fresh)
            rows += len(fresh)
    return rows, [(table, pending) for table, pending in existing if pending]


async def put(db: Connection, arguments: dict[str, Any]) -> Any:
    """The routine `put` with these arguments.

    (placed: uris, or None for all; note: of what is owed, or None; is_owing: somebody owes counters)
    """
    return await db.fetchrow(sql.PUT, *(arguments.get(name) for name in sql.PUT_ARGUMENTS))


async def copy(writer: Writer, db: Connection, table: Table, rows: Sequence[Any]) -> int:
    """COPY rows that no other writer should have written. If one did, raises Contended: begin again, without COPY.

    Returns how many there are now: a trigger can keep some away without an error.
    """
    if not rows:
        return 0
    schema, _, name = table.qualified.rpartition(".")
    try:
        done: str = await db.copy_records_to_table(name, schema_name=schema, columns=table.columns, records=rows)
    except UniqueViolationError as error:
        writer.copying.failed()
        raise Contended(f"COPY of {name}: {error}") from error
    except TypeError as error:  # of the driver: a column has another type
        raise RowRejected(f"{table.name}: {error}") from error
    return int(done.rpartition(" ")[2])


async def _copy_new(
    writer: Writer, db: Connection, table: Table, upserts: list[Change]
) -> tuple[list[Change], list[Change]]:
    """COPY those that a look finds room for. Returns these, and those whose uri or pair is taken."""
    rows = [c.row for c in upserts]
    keys = [table.index(column) for column in (table.key, *table.pair)]
    found = await db.fetch(sql.taken(table), *([row[key] for row in rows] for key in keys))  # type: ignore[index]
    taken = {r[0] for r in found}
    if table.pair:
        pairs: set[tuple[str, ...]] = set()
        for change, row in zip(upserts, rows, strict=True):
            if change.uri not in taken:
                before = len(pairs)
                pairs.add((row[keys[1]], row[keys[2]]))  # type: ignore[index]
                if len(pairs) == before:
                    taken.add(change.uri)
    fresh = [c for c in upserts if c.uri not in taken] if taken else upserts
    if await copy(writer, db, table, [c.row for c in fresh]) < len(fresh):
        writer.copying.failed()  # without COPY it is told which rows these are
        raise Contended(f"COPY of {table.name}: rows were kept away")
    return fresh, [c for c in upserts if c.uri in taken]


def divide(changes: list[Change], waiting: set[str]) -> tuple[list[Change], Pending]:
    """Upserts that may be new; and what depends on a row that exists: deletes, and records among the twins."""
    new: list[Change] = []
    pending: Pending = {}
    for change in changes:
        if change.row is None or change.uri in waiting:
            pending[change.uri] = change
        else:
            new.append(change)
    return new, pending


def by_table(changes: Iterable[Change]) -> Iterator[tuple[Table, list[Change]]]:
    """In the order in which every writer locks."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.table.name, []).append(change)
    for table in TABLES:
        if table.name in found:
            yield table, found[table.name]
