"""Loading staged history into the tables: `backfill --bulk`. Read `Load.all` top to bottom.

Each table is one transaction: its indexes go, its rows come from the staging table, its indexes are built again. So a
process that dies at any moment leaves every table whole, either as it was or loaded, and `fastworker.bulk_steps` says
which; the same command goes on. Between the first and the last table the derived ones are behind the primary ones,
and a trigger on every table keeps everybody else from writing: live events wait on the stream.

Staged rows are new by then: what has a row, a twin, a tombstone or a version already was taken out, and so was what
belongs to an account that may not be stored. Those accounts are compared one by one afterwards, beside the stream.

A crash of the server empties the staging tables (store/staged.py). What is loaded stays, and so does what is known of
it: the rows are staged again from the same files, what was taken out is taken out again, and the load goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg

from fastworker.crashpoint import Step, crashpoint
from fastworker.errors import StoreUnavailable, Unreachable
from fastworker.store import derived
from fastworker.store.indexes import build, put_off
from fastworker.store.session import NO_TRANSACTION_TIMEOUT, PATH, translating
from fastworker.store.staged import (
    ALL,
    MARK,
    OF_GATES,
    OF_POSTS,
    PRIMARY,
    ROWS_OF,
    STAGED_VERIFICATIONS,
    TAKEN_OUT,
    Staged,
    staged_name,
)
from fastworker.store.statements import GONE
from fastworker.table.batch import Change
from fastworker.table.chosen import WHOLE, Part
from fastworker.table.derive import did_of
from fastworker.table.schema import DERIVED, GATES, POSTS, TABLES, VERIFICATIONS, Table

STAGING, LOADING, SETTLING = "staging", "loading", "settling"
CONNECTIONS: Final = 2
PROBE_ROWS: Final = 2_000
PROBE_ROWS_MIN: Final = 500  # fewer say little
ROW_TIMES: Final = 1.6
"""What a record costs the load, indexes and derived tables included, in seconds that one row of the largest table takes
with its indexes there (docs/history.md has what was measured)."""
_GUARDED: Final = (
    *(table.qualified for table in (*TABLES, *DERIVED)),
    *(f"public.{name}" for name in ("users", "thread_contexts", "thread_gates", "post_gates", "label_events")),
    *(f"fastworker.{name}" for name in ("versions", "twins", "accounts", "identities")),
)
_SESSION: Final = (
    f"{NO_TRANSACTION_TIMEOUT}SET statement_timeout = 0; SET lock_timeout = '60s'; SET TIME ZONE 'UTC'; SET jit = off; "
    "SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; SET work_mem = '128MB'; "
    # Steps run beside each other: helpers of one would take what another needs, and cost their start.
    "SET max_parallel_maintenance_workers = 0; SET max_parallel_workers_per_gather = 0; "
    "SET maintenance_work_mem = '256MB'; SET client_connection_check_interval = '10s'; "
    "SET fastworker.loading = 'on'; SET default_statistics_target = 10; " + PATH
)
_CONNECT_S: Final = 10.0
_LOCK: Final = 0x6677626C  # "fwbl"
_HOT_SEQ: Final = "CASE WHEN commit_seq ~ '^[0-9]{1,18}$' THEN commit_seq::bigint END"


class File(NamedTuple):
    """A repository on disk, as it was fetched."""

    did: str
    file: str
    rev: str
    seq: int
    entry_id: str | None
    taken_at: datetime
    size: int


class Counts(NamedTuple):
    waiting: int
    staged: int
    refused: int
    later: int
    records: int
    size: int


class Measured(NamedTuple):
    """Before a load: seconds a record, and the bytes of the staging tables."""

    record_s: float
    staged_bytes: int


class State(NamedTuple):
    phase: str
    folder: Path
    derive: frozenset[str]
    part: Part


Told = Callable[[str, int, float], None]
"""A step, its rows and its seconds."""


class Bulk:
    """The record of a bulk load, by one connection."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection

    async def state(self) -> State | None:
        row = await self._row("SELECT phase, folder, derive, since_rev, collections FROM fastworker.bulk")
        if row is None:
            return None
        return State(
            row["phase"],
            Path(row["folder"]),
            frozenset(row["derive"]),
            Part(row["since_rev"], None if row["collections"] is None else tuple(row["collections"])),
        )

    async def begin(self, folder: Path, derive: frozenset[str], part: Part = WHOLE) -> State:
        """Staging tables and the record of it; what is there already goes on. Raises RowRejected, StoreUnavailable."""
        with translating():
            async with self._connection.transaction():
                await self._connection.execute(
                    "INSERT INTO fastworker.bulk (phase, folder, derive, since_rev, collections) "
                    "VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
                    STAGING,
                    str(folder),
                    sorted(derive),
                    *part,
                )
                for staged in ALL:
                    await self._connection.execute(staged.create)
                await self._connection.execute(_MARK)
        state = await self.state()
        assert state is not None
        return state

    async def is_lost(self) -> bool:
        """Whether a crash of the server has taken what was staged."""
        # mutant: bulk forgets a crash
        return bool((await self._row(_IS_LOST))[0])

    async def stage_again(self) -> None:
        """Everything waits once more. While it loads, what is staged then is whole only after `staged_again`."""
        with translating():
            async with self._connection.transaction():
                for staged in ROWS_OF:
                    await self._connection.execute(f"TRUNCATE fastworker.{staged.name}")
                await self._connection.execute(_WAIT_AGAIN, LOADING)
                await self._connection.execute(
                    f"{_MARK} WHERE EXISTS (SELECT FROM fastworker.bulk WHERE phase = '{STAGING}')"
                )

    async def staged_again(self) -> None:
        """What was taken out, or given up, is taken out of what was staged again."""
        with translating():
            async with self._connection.transaction():
                if await self._connection.fetchval(
                    "SELECT EXISTS (SELECT FROM fastworker.bulk_steps WHERE name = 'new')"
                ):
                    await _take_out_again(self._connection)
                await self._empty_given_up()
                await self._connection.execute(_MARK)

    async def add(self, files: Sequence[File]) -> None:
        """Repositories to stage. Of one account the newest counts, unless it is staged already."""
        with translating():
            await self._connection.executemany(_ADD, [tuple(file) for file in files])

    async def counts(self) -> Counts:
        row = await self._row(_COUNTS)
        return Counts(*row)

    async def refused(self) -> list[tuple[str, str]]:
        with translating():
            rows = await self._connection.fetch("SELECT did, error FROM fastworker.bulk_repos WHERE state = 'refused'")
        return [(did, error) for did, error in rows]

    async def later(self) -> list[File]:
        """What is to be settled afterwards."""
        rows = await self.rows(
            "SELECT did, file, rev, seq, entry_id, taken_at, bytes FROM fastworker.bulk_repos "
            "WHERE later IS NOT NULL AND state = 'staged' ORDER BY did"
        )
        return [File(*row) for row in rows]

    async def verifications(self) -> list[Change]:
        """What is to be written afterwards."""
        name = f"fastworker.{STAGED_VERIFICATIONS.name}"
        if await self.rows("SELECT WHERE to_regclass($1) IS NULL", name):
            return []
        rows = await self.rows(f"SELECT {', '.join(STAGED_VERIFICATIONS.columns)} FROM {name} ORDER BY uri")
        return [
            Change(VERIFICATIONS, row[0], did_of(row[0]), row[0].rpartition("/")[2], rev, seq, 0, cid, tuple(row))
            for *row, cid, rev, seq in rows
        ]

    async def settled(self, did: str, error: str | None) -> None:
        with translating():
            await self._connection.execute(
                "UPDATE fastworker.bulk_repos SET state = CASE WHEN $2::text IS NULL THEN 'done' ELSE 'refused' END, "
                "error = $2 WHERE did = $1",
                did,
                error,
            )

    async def others(self, ours: Sequence[str]) -> list[str]:
        """Who else is connected to this database, in words."""
        with translating():
            rows = await self._connection.fetch(_OTHERS, list(ours))
        return [row[0] for row in rows]

    async def rows_there(self) -> int:
        """About how many records the tables hold."""
        row = await self._row(
            "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class "
            "WHERE oid = ANY($1::text[]::regclass[])",
            [table.qualified for table in PRIMARY],
        )
        return int(row[0])

    async def measured(self) -> Measured:
        """What the load will need here: a part of the largest staged table goes into a copy of its own, with all
        indexes, and is taken back."""
        sizes = {}
        for table in PRIMARY:
            if table.hot:
                row = await self._row(f"SELECT count(*) FROM fastworker.{staged_name(table)}")
                sizes[table] = int(row[0])
        table = max(sizes, key=lambda one: sizes[one])
        columns = ", ".join(table.columns)
        with translating():
            transaction = self._connection.transaction()
            await transaction.start()
            await self._connection.execute(
                f"CREATE TABLE fastworker.staged_probe (LIKE {table.qualified} INCLUDING ALL)"
            )
            began = time.monotonic()
            await self._connection.execute(
                f"INSERT INTO fastworker.staged_probe ({columns}) SELECT {columns} "
                f"FROM fastworker.{staged_name(table)} LIMIT {PROBE_ROWS} ON CONFLICT DO NOTHING"
            )
            row_s = (time.monotonic() - began) / max(PROBE_ROWS_MIN, min(PROBE_ROWS, sizes[table]))
            await transaction.rollback()
        names = [f"fastworker.{staged.name}" for staged in ALL]
        staged = await self._row(
            "SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::bigint FROM pg_class "
            "WHERE oid = ANY($1::text[]::regclass[])",
            names,
        )
        return Measured(row_s * ROW_TIMES, int(staged[0]))

    async def hold(self) -> None:
        """From here on nobody else writes. Waits for transactions that are open."""
        with translating():
            async with self._connection.transaction():
                for table in _GUARDED:
                    await self._connection.execute(
                        f"CREATE OR REPLACE TRIGGER fastworker_loading BEFORE INSERT OR UPDATE OR DELETE ON {table} "
                        "FOR EACH STATEMENT EXECUTE FUNCTION fastworker.refuse_while_loading()"
                    )
                await self._connection.execute("UPDATE fastworker.bulk SET phase = $1", LOADING)
        crashpoint(Step.BULK_HELD)

    async def release(self) -> None:
        """Everybody may write again; what was staged goes; who was loaded is done."""
        with translating():
            async with self._connection.transaction():
                await self._release()
                await self._connection.execute(_DONE)
        crashpoint(Step.BULK_RELEASED)

    async def give_up(self) -> str:
        """Undo what can be undone. Returns the phase that it was in.

        While it loads, what is loaded stays: of the tables that are not, nothing is staged any more, so that the rest
        of the load (`Load.all`) makes the derived rows of what is there, and nothing else. It ends with `release`.
        Every account is settled one by one then.
        """
        state = await self.state()
        if state is None:
            return ""
        with translating():
            async with self._connection.transaction():
                if state.phase == LOADING:
                    await self._connection.execute(_GIVEN_UP)
                    await self._connection.execute(_GIVEN_UP_STEPS, list(_GIVEN_UP_WITH), _GIVEN_UP_ROWS)
                    await self._empty_given_up()
                elif state.phase == STAGING:
                    await self._drop(ALL)
                    await self._connection.execute(_AGAIN)
                    await self._forget()
        return state.phase

    async def end(self) -> None:
        with translating():
            async with self._connection.transaction():
                await self._connection.execute(_SETTLED)
                await self._drop([STAGED_VERIFICATIONS])
                await self._forget()

    async def _empty_given_up(self) -> None:
        rows = await self._connection.fetch("SELECT name FROM fastworker.bulk_steps WHERE rows = $1", _GIVEN_UP_ROWS)
        for name in [staged for row in rows for staged in _GIVEN_UP_WITH[row[0]]]:
            await self._connection.execute(f"TRUNCATE fastworker.{name}")

    async def _release(self) -> None:
        for table in _GUARDED:
            await self._connection.execute(f"DROP TRIGGER IF EXISTS fastworker_loading ON {table}")
        await self._drop([staged for staged in ALL if staged is not STAGED_VERIFICATIONS])
        await self._connection.execute("UPDATE fastworker.bulk SET phase = $1", SETTLING)

    async def _drop(self, tables: Sequence[Staged]) -> None:
        for staged in tables:
            await self._connection.execute(f"DROP TABLE IF EXISTS fastworker.{staged.name}")

    async def _forget(self) -> None:
        for table in ("bulk_repos", "bulk_steps", "bulk"):
            await self._connection.execute(f"DELETE FROM fastworker.{table}")

    async def rows(self, statement: str, *arguments: Any) -> list[Any]:
        with translating():
            return list(await self._connection.fetch(statement, *arguments))

    async def _row(self, statement: str, *arguments: Any) -> Any:
        with translating():
            return await self._connection.fetchrow(statement, *arguments)


class Load:
    """The loading phase, on several connections. Every step may be done again, so none waits for the disk: what a crash
    of the server loses is the last steps, with what is known of them. `Bulk.release` waits for all of them."""

    def __init__(self, database_url: str, derive: frozenset[str], told: Told, *, floor: bool) -> None:
        """`floor`: snapshots are whole, of a known moment, and every worker knows floors."""
        self._url = database_url
        self._floor = floor
        self._derive = derive
        self._told = told

    async def all(self) -> None:
        """Raises StoreUnavailable, RowRejected: then the same again, or `Bulk.give_up`."""
        async with _session(self._url, is_durable=False) as connection:
            done = {row[0] for row in await connection.fetch("SELECT name FROM fastworker.bulk_steps")}
            if "new" not in done:
                await self._step(connection, "new", partial(_only_new, floor=self._floor))
            sizes: dict[str, int] = dict(await connection.fetch(_SIZES, [staged.name for staged in ALL]))
            for name, columns in derived.KEYS.items():  # of the others the size says enough
                await connection.execute(f"ANALYZE fastworker.staged_{name} ({columns})")
        steps = [step for step in self._steps(sizes) if step.name not in done]
        # Made from the end: what others wait for, then the largest, so that the last ones are small.
        steps.sort(key=lambda step: (not step.after, sum(sizes.get(f"staged_{name}", 0) for name in step.reads)))
        await self._make(steps)

    def _steps(self, sizes: dict[str, int]) -> list[_Step]:
        """Of the primary tables only those of which something is staged."""
        steps = [_Step("fastworker.twins", _loaded("fastworker.twins", _TWINS), ("twins",), ())]
        for table in PRIMARY:
            own = table.name.rpartition(".")[2]
            steps.append(_Step(table.qualified, _loaded(table.qualified, _inserts(table)), (own,), ()))
        steps = [step for step in steps if f"staged_{step.reads[0]}" in sizes]
        for fill in derived.fills(self._derive):
            steps.append(_Step(fill.table, _loaded(fill.table, (fill.insert,), fill.first), fill.reads, fill.reads))
        for update in derived.updates(self._derive):
            steps.append(
                _Step(update.name, partial(_execute, statements=update.statements), update.reads, update.reads)
            )
        return steps

    async def _make(self, left: list[_Step]) -> None:
        """The last first, from several connections. A derived table comes after the tables from which it follows: a
        load that is given up between them may forget what was staged for the others."""
        unmade = {step.name for step in left}
        news = asyncio.Condition()

        def ready() -> _Step | None:
            return next((step for step in reversed(left) if unmade.isdisjoint(_loads(step.after))), None)

        async def work() -> None:
            async with _session(self._url, is_durable=False) as connection:
                while left:
                    async with news:
                        await news.wait_for(lambda: not left or ready() is not None)
                    if (step := ready()) is None:
                        continue
                    left.remove(step)
                    await self._step(connection, step.name, step.run)
                    unmade.remove(step.name)
                    async with news:
                        news.notify_all()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(CONNECTIONS, len(left))):
                tasks.create_task(work())

    async def _step(self, connection: asyncpg.Connection[Any], name: str, run: Any) -> None:
        began = time.monotonic()
        async with connection.transaction():
            if await connection.fetchval(_IS_LOST):
                raise StoreUnavailable("The database server has crashed. Run the same command again.")
            rows = await run(connection)
            seconds = time.monotonic() - began
            await connection.execute(
                "INSERT INTO fastworker.bulk_steps (name, rows, seconds) VALUES ($1, $2, $3)", name, rows, seconds
            )
            crashpoint(Step.BULK_IN_STEP)
        crashpoint(Step.BULK_AFTER_STEP)
        self._told(name, rows, seconds)


class _Step(NamedTuple):
    """One transaction. `reads`: tables that say how much there is to do; `after`: those that are complete before it."""

    name: str
    run: Callable[[asyncpg.Connection[Any]], Awaitable[int]]
    reads: tuple[str, ...]
    after: tuple[str, ...]


_OF_STAGED: Final = {
    "quotes": POSTS.qualified,
    "notifications": POSTS.qualified,
    **{table.name.rpartition(".")[2]: table.qualified for table in PRIMARY},
}


def _loads(names: tuple[str, ...]) -> set[str]:
    """The steps after which nothing that is staged in these is given up."""
    return {_OF_STAGED[name] for name in names}


def _loaded(
    table: str, inserts: tuple[str, ...], first: tuple[str, ...] = ()
) -> Callable[[asyncpg.Connection[Any]], Awaitable[int]]:
    async def run(connection: asyncpg.Connection[Any]) -> int:
        if first and await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table})"):
            await _execute(connection, first)
        indexes = await put_off(connection, table)
        rows = await _execute(connection, inserts)
        # mutant: bulk loses an index
        await build(connection, table, indexes)
        # A coarse look at the keys, for what follows. Autovacuum makes a finer one, of all columns, afterwards.
        columns = await connection.fetchval(_KEYS, table)
        await connection.execute(f"ANALYZE {table}" + (f" ({columns})" if columns else ""))
        return rows

    return run


async def _execute(connection: asyncpg.Connection[Any], statements: Sequence[str]) -> int:
    return sum([int((await connection.execute(one)).rpartition(" ")[2]) for one in statements])


_KEYS: Final = (
    "SELECT string_agg(DISTINCT quote_ident(a.attname), ', ') FROM pg_index AS i JOIN pg_attribute AS a "
    "ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey) "
    "WHERE i.indrelid = $1::text::regclass AND a.atttypid <> 'tsvector'::regtype"
)
_SIZES: Final = (
    "SELECT relname::text, pg_relation_size(oid) FROM pg_class WHERE relnamespace = 'fastworker'::regnamespace "
    "AND relname = ANY($1::text[]) AND pg_relation_size(oid) > 0"
)
_VERSION: Final = "INSERT INTO fastworker.versions (uri, rev, seq, cid, deleted) SELECT {} FROM fastworker.{}"


def _inserts(table: Table) -> tuple[str, ...]:
    """A row and its version are one transaction: the version alone would say that nothing is missing."""
    columns = ", ".join(table.columns)
    staged = staged_name(table)
    rows = f"INSERT INTO {table.qualified} ({columns}) SELECT {columns} FROM fastworker.{staged}"
    if table.hot:
        return (rows,)
    # mutant: bulk without versions
    return rows, _VERSION.format("uri, version_rev, version_seq, record_cid, false", staged)


_COLD: Final = tuple(table for table in PRIMARY if not table.hot)
_COLD_NAMES: Final = ", ".join(f"'{table.name}'" for table in _COLD)
_TWIN: Final = "uri, table_name, pair, rkey, rev, seq, cid, row_values"
_TWINS: Final = (
    f"INSERT INTO fastworker.twins ({_TWIN}) SELECT {_TWIN} FROM fastworker.staged_twins",
    _VERSION.format("uri, rev, seq, cid, false", f"staged_twins WHERE table_name IN ({_COLD_NAMES})"),
)


# What is new ---------------------------------------------------------------------------------------------

_AUTHOR: Final = "split_part(uri COLLATE \"default\", '/', 3)"
# Whatever is stored of an account: by the author of hot rows, by the URI of everything else.
_KNOWN: Final = " UNION ALL ".join(
    [
        f'SELECT {table.author}, commit_rev COLLATE "C", {_HOT_SEQ} FROM {table.qualified}'
        for table in PRIMARY
        if table.hot and table.author
    ]
    + [f"SELECT {_AUTHOR}, NULL, NULL FROM {table.qualified}" for table in (*_COLD, VERIFICATIONS)]
    + [f"SELECT {_AUTHOR}, rev, seq FROM fastworker.{name}" for name in ("versions", "twins")]
)
_MARK_KNOWN: Final = (
    "UPDATE fastworker.bulk_repos AS r SET later = coalesce(later, 'something of it was stored before') "
    f"FROM (SELECT DISTINCT did FROM ({_KNOWN}) AS k (did, rev, seq)) AS k WHERE k.did = r.did AND r.state = 'staged'"
)
# Those that a settle would refuse: it says why.
_UNWANTED: Final = (
    "CREATE TEMP TABLE unwanted ON COMMIT DROP AS SELECT r.did::text FROM fastworker.bulk_repos AS r JOIN ("
    f"SELECT did, {GONE} FROM fastworker.accounts WHERE deleted_seq IS NOT NULL) AS a (did, gone_rev, gone_seq) "
    'ON a.did = r.did WHERE CASE WHEN a.gone_rev IS NOT NULL THEN r.rev COLLATE "C" < a.gone_rev '
    "ELSE r.seq < a.gone_seq END "
    "UNION SELECT user_did::text FROM public.user_settings WHERE data_collection_forbidden "
    "UNION SELECT r.did::text FROM fastworker.bulk_repos AS r JOIN fastworker.floors AS f ON f.did = r.did "
    "WHERE f.rev > r.rev "
    f"UNION SELECT r.did::text FROM ({_KNOWN}) AS k (did, rev, seq) JOIN fastworker.bulk_repos AS r ON r.did = k.did "
    'WHERE k.seq <= r.seq AND k.rev COLLATE "C" > r.rev'
)
_MAY_NOT: Final = "it may not be stored"
_MARK_UNWANTED: Final = (
    f"UPDATE fastworker.bulk_repos AS r SET later = '{_MAY_NOT}' FROM unwanted AS u "
    "WHERE u.did = r.did AND r.state = 'staged'"
)
_FLOORS: Final = (
    "INSERT INTO fastworker.floors AS f (did, rev, seq) SELECT r.did, r.rev, r.seq FROM fastworker.bulk_repos AS r "
    "WHERE r.state = 'staged' AND NOT EXISTS (SELECT FROM unwanted AS u WHERE u.did = r.did) "
    "ON CONFLICT (did) DO UPDATE SET rev = excluded.rev, seq = excluded.seq, written_at = now() "
    "WHERE excluded.rev > f.rev OR (excluded.rev = f.rev AND excluded.seq >= f.seq)"
)
_OF_UNWANTED: Final = "DELETE FROM fastworker.{} AS s USING unwanted AS u WHERE split_part(s.uri, '/', 3) = u.did"
_UNWANTED_AGAIN: Final = (
    "DELETE FROM fastworker.{} AS s USING fastworker.bulk_repos AS r "
    f"WHERE r.later = '{_MAY_NOT}' AND split_part(s.uri, '/', 3) = r.did"
)
_TAKEN_OUT_AGAIN: Final = f"DELETE FROM fastworker.{{}} AS s USING fastworker.{TAKEN_OUT.name} AS t WHERE t.uri = s.uri"
_TWINS_OF_KNOWN: Final = (
    "DELETE FROM fastworker.staged_twins AS s USING fastworker.bulk_repos AS r "
    "WHERE r.did = s.did AND r.later IS NOT NULL"
)
_WITHOUT_POST: Final = tuple(
    f"DELETE FROM fastworker.staged_{name} AS s WHERE NOT EXISTS ("
    f"SELECT FROM fastworker.staged_posts AS p WHERE p.uri = {post})"
    for name, post in (("quotes", "s.post_uri"), ("notifications", "split_part(s.uri, '#', 1)"))
)
_WITHOUT_GATE: Final = tuple(
    f"DELETE FROM fastworker.staged_{kind}_gates AS s WHERE NOT EXISTS (SELECT FROM fastworker.staged_gates AS g "
    f"WHERE g.post_uri = s.post_uri AND g.kind = '{kind}')"
    for kind in ("thread", "post")
)


def _not_new(table: Table) -> str:
    """Takes out staged rows whose URI or pair is known."""
    known = [
        f"SELECT FROM {table.qualified} AS t WHERE t.uri = s.uri",
        'SELECT FROM fastworker.versions AS v WHERE v.uri = s.uri COLLATE "C"',
        'SELECT FROM fastworker.twins AS w WHERE w.uri = s.uri COLLATE "C"',
    ]
    if table.pair:
        on = " AND ".join(f"t.{column} = s.{column}" for column in table.pair)
        pair = " || E'\\n' || ".join(f"s.{column}" for column in table.pair)
        known.append(f"SELECT FROM {table.qualified} AS t WHERE {on}")
        known.append(
            f"SELECT FROM fastworker.twins AS w WHERE w.table_name = '{table.name}' AND w.pair = ({pair}) COLLATE \"C\""
        )
    conditions = " OR ".join(f"EXISTS ({one})" for one in known)
    return (
        f"WITH taken AS (DELETE FROM fastworker.{staged_name(table)} AS s WHERE split_part(s.uri, '/', 3) IN ("
        f"SELECT did FROM fastworker.bulk_repos WHERE later IS NOT NULL) AND ({conditions}) RETURNING s.uri) "
        f"INSERT INTO fastworker.{TAKEN_OUT.name} SELECT uri FROM taken"
    )


async def _only_new(connection: asyncpg.Connection[Any], *, floor: bool) -> int:
    """Afterwards what is staged is exactly what will be loaded. Returns how many rows were taken out.

    Where nothing of a repository is known, and it may be stored, all of it is new: then nothing is searched. Nobody
    else has a transaction open, so that floors need not be waited for.
    """
    await _execute(connection, [_MARK_KNOWN])
    await connection.execute(_UNWANTED)
    taken = 0
    if await connection.fetchval("SELECT EXISTS (SELECT FROM unwanted)"):
        await _execute(connection, [_MARK_UNWANTED])
        for table in PRIMARY:
            taken += await _execute(connection, [_OF_UNWANTED.format(staged_name(table))])
        await connection.execute(_OF_UNWANTED.format(STAGED_VERIFICATIONS.name))
    if await connection.fetchval("SELECT EXISTS (SELECT FROM fastworker.bulk_repos WHERE later IS NOT NULL)"):
        await connection.execute(TAKEN_OUT.create)  # a release before may have begun
        # mutant: bulk loads what is known
        taken += await _execute(connection, [_not_new(table) for table in PRIMARY])
        taken += await _execute(connection, [_TWINS_OF_KNOWN, *_WITHOUT_POST, *_WITHOUT_GATE])
    if floor:
        await connection.execute(_FLOORS)
    return taken


async def _take_out_again(connection: asyncpg.Connection[Any]) -> None:
    """What `_only_new` has taken out, from what was staged once more. The tables hold what is loaded by now, so that
    they cannot be asked."""
    for table in PRIMARY:
        await connection.execute(_TAKEN_OUT_AGAIN.format(staged_name(table)))
    for staged in (*(staged_name(table) for table in PRIMARY), STAGED_VERIFICATIONS.name):
        await connection.execute(_UNWANTED_AGAIN.format(staged))
    await _execute(connection, [_TWINS_OF_KNOWN, *_WITHOUT_POST, *_WITHOUT_GATE])


# The record ----------------------------------------------------------------------------------------------

_MARK: Final = f"INSERT INTO fastworker.{MARK.name} SELECT true"
_IS_LOST: Final = (  # a load that an earlier release has begun has no mark, and cannot be lost
    "SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'fastworker'::regnamespace "
    f"AND relname = '{MARK.name}' AND pg_relation_size(oid) = 0)"
)
_WAIT_AGAIN: Final = (
    "UPDATE fastworker.bulk_repos SET state = 'waiting', records = 0, "
    "later = CASE WHEN (SELECT phase FROM fastworker.bulk) = $1 THEN later END WHERE state = 'staged'"
)

_ADD: Final = (
    "INSERT INTO fastworker.bulk_repos AS r (did, file, rev, seq, entry_id, taken_at, bytes) "
    "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (did) DO UPDATE SET file = excluded.file, rev = excluded.rev, "
    "seq = excluded.seq, entry_id = excluded.entry_id, taken_at = excluded.taken_at, bytes = excluded.bytes, "
    "state = 'waiting', error = NULL WHERE r.state <> 'staged' AND excluded.rev >= r.rev"
)
_COUNTS: Final = (
    "SELECT count(*) FILTER (WHERE state = 'waiting'), count(*) FILTER (WHERE state = 'staged'), "
    "count(*) FILTER (WHERE state = 'refused'), count(*) FILTER (WHERE state = 'staged' AND later IS NOT NULL), "
    "coalesce(sum(records), 0)::bigint, coalesce(sum(bytes), 0)::bigint FROM fastworker.bulk_repos"
)
_OTHERS: Final = (
    "SELECT 'PID ' || pid || coalesce(' (' || nullif(application_name, '') || ')', '') || ' as ' || usename "
    "FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' "
    "AND pid <> pg_backend_pid() AND application_name <> ALL($1::text[]) ORDER BY pid"
)
_DONE: Final = "UPDATE fastworker.bulk_repos SET state = 'done' WHERE state = 'staged' AND later IS NULL"
_GIVEN_UP: Final = (
    "UPDATE fastworker.bulk_repos SET later = coalesce(later, 'the load was given up') WHERE state = 'staged'"
)
# Steps that are not made any more, and what was staged for each.
_GIVEN_UP_ROWS: Final = -1
_GIVEN_UP_WITH: Final = {
    **{table.qualified: (staged_name(table),) for table in PRIMARY},
    POSTS.qualified: (staged_name(POSTS), *OF_POSTS),
    GATES.qualified: (staged_name(GATES), *OF_GATES),
    "fastworker.twins": ("staged_twins",),
    "verifications": (STAGED_VERIFICATIONS.name,),
}
_GIVEN_UP_STEPS: Final = (
    "INSERT INTO fastworker.bulk_steps (name, rows, seconds) SELECT name, $2, 0 FROM unnest($1::text[]) AS s (name) "
    "ON CONFLICT DO NOTHING"
)
_SETTLED: Final = (
    "UPDATE fastworker.repos AS q SET state = CASE b.state WHEN 'done' THEN 'done' ELSE 'refused' END, rev = b.rev, "
    "seq = b.seq, records = b.records, bytes = b.bytes, differences = b.records, error = b.error, ended_at = now() "
    "FROM fastworker.bulk_repos AS b WHERE b.did = q.did AND q.state = 'spooled'"
)
_AGAIN: Final = (
    "UPDATE fastworker.repos SET state = 'waiting', next_at = '-infinity', attempts = 0 WHERE state = 'spooled'"
)


@asynccontextmanager
async def _session(database_url: str, *, is_durable: bool = True) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Plans for sets, not for keys."""
    with translating():
        connection = await asyncpg.connect(
            database_url,
            timeout=_CONNECT_S,
            command_timeout=None,
            server_settings={"application_name": "fastworker-bulk"},
        )
        try:
            await connection.execute(_SESSION if is_durable else f"{_SESSION}; SET synchronous_commit = off")
            yield connection
        finally:
            connection.terminate()


@asynccontextmanager
async def open_bulk(database_url: str) -> AsyncIterator[Bulk]:
    """One at a time. Raises StoreUnavailable, and Unreachable while another one is at work."""
    async with _session(database_url) as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
            raise Unreachable("Another `backfill --bulk` or `import --bulk` is at work on this database")
        yield Bulk(connection)
