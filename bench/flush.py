"""The store alone, and the ways in which rows could be written side by side: what a batch size costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from asyncpg.exceptions import UniqueViolationError

from bench.corpus import entries
from bench.servers import cpu_s, servers
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.store import statements as sql
from fastworker.store.rules import Rules
from fastworker.store.session import SESSION
from fastworker.store.store import Store
from fastworker.table import derive as derived
from fastworker.table.batch import Batch, Row
from fastworker.table.mapper import map_commit
from fastworker.table.schema import LIKES, NOTIFICATIONS, Table, qualified

ENTRY_MS = 1_790_000_000_000
SIZES = (1, 3, 10, 30, 100, 200, 300, 1_000, 3_000, 10_000)
BASE = 20_000  # rows that are there before, so that small batches do not meet an empty table

Strategy = Callable[[Any, Table, list[Row]], Awaitable[None]]


def flush(folder: Path, *, size: int, events: int, derive: str) -> dict[str, Any]:
    """`Store.write` with one connection: all of a flush, batches of `size` entries."""
    batches = [Batch()]
    for event in _events(folder, events):
        if isinstance(event, Commit):
            batches[-1].put(map_commit(event, ENTRY_MS))
        batches[-1].settle("1-1", payload_bytes=1)
        if len(batches[-1].entries) >= size:
            batches.append(Batch())
    batches = [batch for batch in batches if batch]
    with servers() as running:

        async def write() -> tuple[float, float]:
            store = await Store.connect(
                running.postgres.url, rules=Rules(derived.FULL if derive == "full" else derived.CORE)
            )
            start, own = time.perf_counter(), time.process_time()
            for batch in batches:
                await store.write(batch)
            took = time.perf_counter() - start, time.process_time() - own
            await store.close()
            return took

        before = cpu_s(running.postgres.pid)
        seconds, own = uvloop.run(write())
        server = cpu_s(running.postgres.pid) - before
    written = sum(len(batch.entries) for batch in batches)
    return {
        "events/s": written / seconds,
        "ms per flush": seconds / len(batches) * 1e3,
        "writer CPU us/event": own / written * 1e6,
        "postgres CPU us/event": server / written * 1e6,
    }


def _events(folder: Path, count: int) -> Iterator[Any]:
    for fields in entries(folder, "native", count):
        yield decode_entry(fields)


# Strategies -------------------------------------------------------------------------------------
# Each writes rows of which some may be there already, within a transaction, and leaves those alone.


async def _rows(connection: Any, table: Table, rows: list[Row]) -> None:
    """The product's for small batches: one array of composites."""
    await connection.fetch(sql.insert(table), rows)


async def _columns(connection: Any, table: Table, rows: list[Row]) -> None:
    arrays = ", ".join(f"${n}::{kind}[]" for n, kind in enumerate(table.types, 1))
    columns = ", ".join(table.columns)
    await connection.fetch(
        f"INSERT INTO {qualified(table.name)} ({columns}) SELECT * FROM unnest({arrays}) "
        f"ON CONFLICT DO NOTHING RETURNING {table.key}",
        *zip(*rows, strict=True),
    )


async def _many(connection: Any, table: Table, rows: list[Row]) -> None:
    values = ", ".join(f"${n}" for n in range(1, len(table.columns) + 1))
    await connection.executemany(
        f"INSERT INTO {qualified(table.name)} ({', '.join(table.columns)}) VALUES ({values}) ON CONFLICT DO NOTHING",
        rows,
    )


async def _staging(connection: Any, table: Table, rows: list[Row]) -> None:
    columns = ", ".join(table.columns)
    await connection.copy_records_to_table(f"staging_{table.name}", columns=table.columns, records=rows)
    await connection.fetch(
        f"INSERT INTO {qualified(table.name)} ({columns}) SELECT {columns} FROM staging_{table.name} "
        f"ON CONFLICT DO NOTHING RETURNING {table.key}"
    )


async def _copy(connection: Any, table: Table, rows: list[Row]) -> None:
    await connection.copy_records_to_table(table.name, schema_name="public", columns=table.columns, records=rows)


async def _copy_else_rows(connection: Any, table: Table, rows: list[Row]) -> None:
    try:
        async with connection.transaction():
            await _copy(connection, table, rows)
    except UniqueViolationError:
        await _rows(connection, table, rows)


async def _look_and_copy(connection: Any, table: Table, rows: list[Row]) -> None:
    """The product's for large batches."""
    keys = [table.index(column) for column in (table.key, *table.pair)]
    found = await connection.fetch(sql.taken(table), *([row[key] for row in rows] for key in keys))
    taken = {r[0] for r in found}
    await _copy(connection, table, [row for row in rows if row[0] not in taken] if taken else rows)


ARRAY, LOOK = "array of rows", "look + COPY"
STRATEGIES: dict[str, Strategy] = {
    ARRAY: _rows,
    "arrays of columns": _columns,
    "executemany": _many,
    "COPY to staging + insert": _staging,
    "COPY, else array of rows": _copy_else_rows,
    LOOK: _look_and_copy,
}


def strategies(folder: Path, *, table: Table, old: float, events: int) -> tuple[dict[str, Any], str]:
    """Microseconds per row of each strategy at each batch size, and the same as text. `old`: the share of rows that
    are there already."""
    rows = _unique(folder, table, events)
    with servers() as running:
        costs = uvloop.run(_compare(running.postgres.url, table, rows, old))
    figures: dict[str, Any] = {f"{name} {size}": us for (name, size), us in costs.items()}
    sizes = sorted({size for _, size in costs})
    crossing = next((size for size in sizes if all(costs[LOOK, s] < costs[ARRAY, s] for s in sizes if s >= size)), None)
    figures[f"{LOOK} beats {ARRAY} from"] = crossing if crossing is not None else f"above {sizes[-1]:,}"
    lines = [f"  {'microseconds per row':<26}" + "".join(f"{size:>10,}" for size in sizes)]
    lines += [f"  {name:<26}" + "".join(f"{costs[name, size]:>10.1f}" for size in sizes) for name in STRATEGIES]
    lines.append(f"  {LOOK} beats {ARRAY} from batches of {figures[f'{LOOK} beats {ARRAY} from']}")
    return figures, "\n".join(lines)


def _unique(folder: Path, table: Table, events: int) -> list[Row]:
    """The corpus's rows of a table, none of which keeps another one out."""
    effects = derived.Effects(derived.FULL)
    found: dict[tuple[Any, ...], Row] = {}
    for event in _events(folder, events):
        for change in map_commit(event, ENTRY_MS).changes if isinstance(event, Commit) else ():
            if change.row is None:
                continue
            if change.table is table:
                found[tuple(change.row[table.index(column)] for column in table.pair or (table.key,))] = change.row
            elif table is NOTIFICATIONS:
                derived.added(effects, change.table, change.row, change.cid)
    if table is NOTIFICATIONS:
        return list(effects.notes_added.values())
    return list(found.values())


async def _compare(url: str, table: Table, rows: list[Row], old: float) -> dict[tuple[str, int], float]:
    connection = await asyncpg.connect(url)
    await connection.execute(SESSION)
    await connection.execute(
        f"CREATE TEMP TABLE staging_{table.name} ON COMMIT DELETE ROWS AS "
        f"SELECT {', '.join(table.columns)} FROM {qualified(table.name)} LIMIT 0"
    )
    half = min(BASE, len(rows) // 2)
    base, fresh = rows[:half], rows[half:]
    costs = {}
    for size in (size for size in SIZES if size <= len(fresh)):
        count = max(3, min(100, 5_000 // size, len(fresh) // size))
        for name, write in STRATEGIES.items():
            await connection.execute(f"TRUNCATE {qualified(table.name)}")
            await _copy(connection, table, base)
            times = []
            for n in range(min(count, len(fresh) // size)):
                known = round(size * old)
                batch = sorted(fresh[n * size : (n + 1) * size - known] + base[n * known : (n + 1) * known])
                start = time.perf_counter()
                async with connection.transaction():
                    await write(connection, table, batch)
                times.append(time.perf_counter() - start)
            costs[name, size] = statistics.median(times[1:] or times) / size * 1e6  # the first one prepares statements
    await connection.close()
    return costs


TABLES = (LIKES, NOTIFICATIONS)
