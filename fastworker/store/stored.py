"""What is stored of one account, in the order of its repository's keys: the reading half of a settle.

One connection that only reads. The rows of an account come from a cursor, so that a million of them need no memory.
Rows that nobody of ours wrote are found in tables that have an index on their author; of list items and verifications
only those with a version of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import datetime
from enum import IntEnum
from typing import Any, Final, NamedTuple

import asyncpg

from fastworker.store import statements as sql
from fastworker.store.audit import Audit, StoredRecord
from fastworker.store.session import translating
from fastworker.store.settle import thaw
from fastworker.table.batch import Change, Row, seq_of
from fastworker.table.chosen import Part
from fastworker.table.schema import BOOKMARKS, COLLECTIONS, TABLES, Table, collection_table
from fastworker.table.snapshot import UNTOUCHED

_SESSION: Final = (
    "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off; "
    "SET plan_cache_mode = force_custom_plan; SET default_transaction_read_only = on; SET TIME ZONE 'UTC'; "
    "SET statement_timeout = '300s'"
)
_CONNECT_S: Final = 10.0
_LOCK: Final = 0x66777374  # class of the advisory locks of accounts that are settled; "fwst"
_ALONE: Final = (
    "SELECT pg_advisory_lock($2, key) FROM (SELECT DISTINCT hashtext(did) AS key FROM unnest($1::text[]) AS a (did) "
    "ORDER BY 1) AS k"
)
_PREFETCH: Final = 2_000
_HOT: Final = tuple((table.name, table.author) for table in TABLES if table.hot)
_COLD: Final = tuple(
    (table.name, table.author) for table in TABLES if table.author and not table.hot and table is not BOOKMARKS
)
_SEQ: Final = "CASE WHEN commit_seq ~ '^[0-9]{1,18}$' THEN commit_seq::bigint END"
_RANGE: Final = """uri COLLATE "C" >= 'at://' || $1 || '/' AND uri COLLATE "C" < 'at://' || $1 || '0'"""
_OF_HOT: Final = " UNION ALL ".join(
    f"SELECT uri, commit_rev AS rev, {_SEQ} AS seq, indexed_at, 0 AS place FROM public.{t} WHERE {a} = $1"
    for t, a in _HOT
)
_OF_OURS: Final = (
    f"SELECT uri, rev, seq, NULL::timestamp, 1 FROM fastworker.twins WHERE {_RANGE} "
    f"UNION ALL SELECT uri, rev, seq, NULL, CASE WHEN deleted THEN 2 ELSE 0 END FROM fastworker.versions WHERE {_RANGE}"
)
_FOREIGN: Final = " UNION ALL ".join(
    f"SELECT t.uri, NULL::text, NULL::bigint, t.indexed_at, 0 FROM public.{table} AS t WHERE t.{author} = $1 "
    "AND NOT EXISTS (SELECT 1 FROM fastworker.versions AS v WHERE v.uri = t.uri)"
    for table, author in _COLD
)
_STANDING: Final = (
    f"""SELECT * FROM ({_OF_HOT} UNION ALL {_OF_OURS} UNION ALL {_FOREIGN}) AS s ORDER BY uri COLLATE "C" """
)
_HANDLE: Final = (
    "SELECT u.handle, i.handle, i.resolve_pending FROM fastworker.identities AS i "
    "LEFT JOIN public.users AS u ON u.did = i.did WHERE i.did = $1"
)


def _of(did: str, statement: str) -> str:
    return statement.replace("$1", did)


_OF_MANY: Final = (
    "SELECT s.* FROM unnest($1::varchar[]) AS a (did) CROSS JOIN LATERAL "
    f"({_of('a.did', _OF_OURS)} UNION ALL {_of('a.did', _FOREIGN)}) AS s LIMIT $2"
)


def _rows_of_many(table: Table) -> str:
    of_uris, _, _ = sql.select(table).partition(" WHERE ")
    columns = of_uris.replace(" FROM ", ", indexed_at FROM ", 1)
    return f"{columns} WHERE {table.author} = ANY($1::varchar[]) LIMIT $2"


_ROWS_OF_MANY: Final = tuple((table, _rows_of_many(table)) for table in TABLES if table.hot)
_ACCOUNT_STATES: Final = (
    'SELECT a.did, CASE WHEN $3::boolean THEN (SELECT max(rev COLLATE "C") FROM '
    f"({_of('a.did', _OF_HOT)} UNION ALL {_of('a.did', _OF_OURS)}) AS s WHERE seq <= a.seq AND place < 2) END, d.*, "
    "EXISTS (SELECT 1 FROM public.user_settings AS u WHERE u.user_did = a.did AND u.data_collection_forbidden) "
    "FROM unnest($1::varchar[], $2::bigint[]) AS a (did, seq) LEFT JOIN LATERAL ("
    f"SELECT {sql.GONE} FROM fastworker.accounts WHERE accounts.did = a.did AND deleted_seq IS NOT NULL) "
    "AS d (deleted_rev, deleted_seq) ON true"
)


class Place(IntEnum):
    ROW = 0
    TWIN = 1
    TOMBSTONE = 2


class Standing(NamedTuple):
    """What is stored of a record: its version (both None: nobody of ours wrote it), and when the row was made, where
    it says."""

    uri: str
    rev: str | None
    seq: int | None
    indexed_at: datetime | None
    place: int = Place.ROW


class AccountState(NamedTuple):
    """`newest_rev`: of what was stored up to a seq. What a deletion of the account beats: see table.batch.is_gone."""

    newest_rev: str | None
    deleted_rev: str | None
    deleted_seq: int | None
    is_forbidden: bool


class Holding(NamedTuple):
    """All that is stored of some accounts, by URI.

    `hot`: rows of hot tables as they were read, when they were made at their end. `standing`: where everything else
    stands, and `rows`: those of the others' rows that are in their tables.
    """

    standing: dict[str, list[Standing]]
    rows: dict[str, Row]
    hot: Mapping[str, Sequence[Any]]

    def standing_of(self, uri: str) -> Sequence[Standing]:
        others = self.standing.get(uri, ())
        row = self.hot.get(uri)
        return others if row is None else (Standing(uri, row[-2], seq_of(row[-3]), row[-1]), *others)

    def row_of(self, uri: str) -> Row | None:
        row = self.hot.get(uri)
        return self.rows.get(uri) if row is None else tuple(row[:-1])


class Stored:
    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection
        self._audit = Audit(connection, frozenset())

    async def account_states(
        self, until: Mapping[str, int], *, is_newest_asked: bool = True
    ) -> dict[str, AccountState]:
        """By DID; `until`: the seq of each. Where the newest revision is not asked for it is None."""
        with translating():
            rows = await self._connection.fetch(_ACCOUNT_STATES, list(until), list(until.values()), is_newest_asked)
        return {did: AccountState(*state) for did, *state in rows}

    async def holding(self, dids: Sequence[str], rows_max: int, parts: Collection[Part]) -> Holding | None:
        """All of these accounts in these parts of them, or more; None where that is over `rows_max` rows of a table.

        Reads each table once, so that nothing is looked up by its key but what is rare.
        """
        tables = {table.name for name, table in COLLECTIONS.items() if any(part.has(name) for part in parts)}
        hot: dict[str, Sequence[Any]] = {}
        for table, statement in _ROWS_OF_MANY:
            if table.name not in tables:
                continue
            author = 0 if table.author is None else table.index(table.author)
            with translating():
                found = await self._connection.fetch(statement, dids, rows_max)
            if len(found) == rows_max:
                return None
            hot.update((row[0], row) for row in found if row[0].startswith(f"at://{row[author]}/"))
        with translating():
            found = await self._connection.fetch(_OF_MANY, dids, rows_max)
        if len(found) == rows_max:
            return None
        standing: dict[str, list[Standing]] = {}
        rows: dict[str, Row] = {}
        cold: dict[str, tuple[Table, list[str]]] = {}
        for record in found:
            one = Standing(*record)
            table = collection_table(one.uri)
            if table.name in UNTOUCHED or not one.uri.startswith("at://"):
                continue
            standing.setdefault(one.uri, []).append(one)
            if one.place == Place.ROW:
                cold.setdefault(table.name, (table, []))[1].append(one.uri)
        for table, uris in cold.values():
            rows |= await self.table_rows(table, uris)
        return Holding(standing, rows, hot)

    @contextlib.asynccontextmanager
    async def alone(self, dids: Sequence[str]) -> AsyncIterator[None]:
        """Nobody else who asks for it settles one of these accounts meanwhile: of two snapshots of one account, the
        second one must see what the first has written."""
        with translating():
            await self._connection.execute(_ALONE, dids, _LOCK)
        try:
            yield
        finally:
            with translating():
                await self._connection.execute("SELECT pg_advisory_unlock_all()")

    async def table_rows(self, table: Table, uris: Sequence[str]) -> dict[str, Row]:
        with translating():
            return {row[0]: tuple(row) for row in await self._connection.fetch(sql.select(table), uris)}

    async def status(self, did: str) -> tuple[bool, str | None]:
        """(active, status) by the newest #account event; somebody who had none is active."""
        with translating():
            row = await self._connection.fetchrow("SELECT active, status FROM fastworker.accounts WHERE did = $1", did)
        active, status = (True, None) if row is None else row
        return active, status

    async def handle(self, did: str) -> tuple[str | None, str | None, bool]:
        """(shown, claimed by the newest event, whether it is to be looked up still)."""
        with translating():
            row = await self._connection.fetchrow(_HANDLE, did)
        shown, claimed, is_pending = (None, None, False) if row is None else row
        return shown, claimed, is_pending

    async def recorded_repairs(self) -> list[str]:
        """DIDs whose #sync came by the stream, the oldest first."""
        with translating():
            rows = await self._connection.fetch("SELECT did FROM fastworker.repairs ORDER BY seen_at, did")
        return [row[0] for row in rows]

    @contextlib.asynccontextmanager
    async def standing(self, did: str) -> AsyncIterator[StandingRows]:
        with translating():
            transaction = self._connection.transaction(readonly=True)
            await transaction.start()
        try:
            with translating():
                cursor = await self._connection.cursor(_STANDING, did)
            yield StandingRows(cursor, did)
        finally:
            with translating():
                await transaction.rollback()

    async def rows(self, did: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(table, row) of every stored record, in the order of their URIs; JSON columns are text."""
        async with self.standing(did) as standing:
            piece: dict[str, None] = {}
            async for one in standing.up_to(None):
                if one.place == Place.TOMBSTONE:
                    continue
                piece[one.uri] = None
                if len(piece) >= _PREFETCH:
                    for found in await self._rows(list(piece)):
                        yield found
                    piece.clear()
            for found in await self._rows(list(piece)):
                yield found

    async def _rows(self, uris: list[str]) -> list[tuple[str, dict[str, Any]]]:
        by_table: dict[str, tuple[Table, list[str]]] = {}
        for uri in uris:
            table = collection_table(uri)
            by_table.setdefault(table.name, (table, []))[1].append(uri)
        found = []
        for table, mine in by_table.values():
            with translating():
                rows = [tuple(row) for row in await self._connection.fetch(sql.select(table), mine)]
            there = {row[0] for row in rows}
            rows += [row for uri, (row, _, _) in (await self.twin_rows(table, mine)).items() if uri not in there]
            found += [(table.name, dict(zip(table.columns, row, strict=True))) for row in rows]
        return sorted(found, key=lambda one: one[1]["uri"])

    async def held(self, table: Table, changes: Sequence[Change]) -> list[StoredRecord]:
        """What the database has of the records that these changes are about."""
        return await self._audit.held(table, changes)

    async def twin_rows(self, table: Table, uris: Sequence[str]) -> dict[str, tuple[Row, str | None, int | None]]:
        """Rows that are among the twins, with their versions."""
        with translating():
            rows = await self._connection.fetch(
                "SELECT uri, row_values, rev, seq FROM fastworker.twins WHERE uri = ANY($1::text[])", list(uris)
            )
        return {uri: (thaw(table, stored), rev, seq) for uri, stored, rev, seq in rows}


class StandingRows:
    """The stored records of one account, once through, in the order of their URIs. One may come twice."""

    def __init__(self, cursor: Any, did: str) -> None:
        self._cursor = cursor
        self._start = f"at://{did}/"
        self._ahead: list[Standing] = []
        self._at_end = False

    async def up_to(self, last: str | None) -> AsyncIterator[Standing]:
        """The next ones, up to and including `last`; None: all that are left."""
        while True:
            if not self._ahead:
                if self._at_end:
                    return
                with translating():
                    self._ahead = [Standing(*row) for row in reversed(await self._cursor.fetch(_PREFETCH))]
                self._at_end = len(self._ahead) < _PREFETCH
                continue
            if last is not None and self._ahead[-1].uri > last:
                return
            one = self._ahead.pop()
            if one.uri.startswith(self._start) and collection_table(one.uri).name not in UNTOUCHED:
                yield one


@contextlib.asynccontextmanager
async def open_stored(database_url: str) -> AsyncIterator[Stored]:
    """Raises StoreUnavailable."""
    with translating():
        connection = await asyncpg.connect(
            database_url,
            timeout=_CONNECT_S,
            command_timeout=330.0,
            server_settings={"application_name": "fastworker-settle"},
        )
    try:
        with translating():
            await connection.execute(_SESSION)
        yield Stored(connection)
    finally:
        connection.terminate()
