"""Rows of history on their way: tables without indexes in our schema, filled by COPY from any number of processes.

They are not in the write-ahead log: that makes a load a tenth cheaper, and a crash of the server empties them. `MARK`
says whether it did: then they are made again from the files (`Bulk.is_lost`).

One table for each primary one, with what a load needs beside its row: the CID of records whose table has no column for
it, and the version of those whose table has none. What follows from a single record alone and needs its JSON (quotes,
notifications of posts, gates) is staged as rows too, made by the writer's own rules (table/derive.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import asyncpg

from fastworker.store.session import NO_TRANSACTION_TIMEOUT, PATH, translating
from fastworker.store.settle import freeze
from fastworker.table import derive
from fastworker.table.batch import Change, Row
from fastworker.table.derive import Effects, post_gate_row, thread_gate_row
from fastworker.table.pairs import pair_of
from fastworker.table.rows import GATE
from fastworker.table.schema import (
    FOLLOWS,
    GATES,
    LIKES,
    NOTIFICATIONS,
    POSTS,
    QUOTES,
    REPOSTS,
    TABLES,
    VERIFICATIONS,
    Table,
)
from fastworker.table.snapshot import UNTOUCHED

ROWS: Final = 20_000
"""Of one transaction, about: what is held in memory, and what a kill costs."""
_CONNECT_S: Final = 10.0

PRIMARY: Final = tuple(table for table in TABLES if table.name not in UNTOUCHED and table is not VERIFICATIONS)
"""Verifications of one account by several others are one pair: whose row it is cannot be told from one repository. They
are staged, too, and written as events are, after the load."""
_WITH_CID: Final = (LIKES, REPOSTS, FOLLOWS)


class Staged(NamedTuple):
    """A staging table: columns and their types. `is_lasting`: it outlives a crash of the server."""

    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    is_lasting: bool = False

    @property
    def create(self) -> str:
        """Where it is not there yet."""
        columns = ", ".join(f"{c} {kind}" for c, kind in zip(self.columns, self.types, strict=True))
        kind = "TABLE" if self.is_lasting else "UNLOGGED TABLE"
        return f"CREATE {kind} IF NOT EXISTS fastworker.{self.name} ({columns}) WITH (autovacuum_enabled = false)"


def staged_name(table: Table) -> str:
    return f"staged_{table.name.rpartition('.')[2]}"


def _staged(table: Table) -> Staged:
    more: tuple[tuple[str, str], ...] = (("record_cid", "text"),) if table in _WITH_CID or not table.hot else ()
    if not table.hot:
        more += (("version_rev", "text"), ("version_seq", "bigint"))
    return Staged(staged_name(table), (*table.columns, *(m[0] for m in more)), (*table.types, *(m[1] for m in more)))


STAGED_VERIFICATIONS: Final = _staged(VERIFICATIONS)._replace(is_lasting=True)  # needed after the load
_OF: Final = {table.name: _staged(table) for table in PRIMARY}
_QUOTES: Final = Staged("staged_quotes", QUOTES.columns, QUOTES.types)
_NOTES: Final = Staged("staged_notifications", NOTIFICATIONS.columns, NOTIFICATIONS.types)
_THREAD_GATES: Final = Staged(
    "staged_thread_gates",
    ("post_uri", "owner_did", "mentions", "following", "list_members", "list_uris", "created_at"),
    ("varchar", "varchar", "boolean", "boolean", "boolean", "jsonb", "timestamp"),
)
_POST_GATES: Final = Staged(
    "staged_post_gates", ("post_uri", "embedding_rules", "created_at"), ("varchar", "jsonb", "timestamp")
)
_TWINS: Final = Staged(
    "staged_twins",
    ("did", "uri", "table_name", "pair", "rkey", "rev", "seq", "cid", "row_values"),
    ("text", "text", "text", "text", "text", "text", "bigint", "text", "jsonb"),
)
MARK: Final = Staged("staged_mark", ("is_whole",), ("boolean",))
"""One row, while nothing that was staged is lost."""
TAKEN_OUT: Final = Staged("staged_taken_out", ("uri",), ("text",), is_lasting=True)
"""URIs of records that were known before the load, which are not loaded."""
OF_POSTS: Final = (_QUOTES.name, _NOTES.name)
OF_GATES: Final = (_THREAD_GATES.name, _POST_GATES.name)
ROWS_OF: Final = (*_OF.values(), STAGED_VERIFICATIONS, _QUOTES, _NOTES, _THREAD_GATES, _POST_GATES, _TWINS)
ALL: Final = (*ROWS_OF, MARK, TAKEN_OUT)


class Rows:
    """What one transaction stages."""

    def __init__(self, features: frozenset[str]) -> None:
        self._features = features & {"quotes", "notifications"}
        self._rows: dict[Staged, list[Row]] = {}
        self._pairs: set[str] = set()
        self._paired: Table | None = None
        self.dids: list[str] = []
        self.count = 0

    def put(self, changes: Sequence[Change]) -> None:
        """Rows of one repository, in the order of its keys."""
        effects = Effects(self._features)
        for change in changes:
            table, row = change.table, change.row
            if row is None:
                continue
            if table is VERIFICATIONS:
                self._add(STAGED_VERIFICATIONS, (*row, change.cid, change.rev, change.seq))
                continue
            if table.pair and self._is_twin(change, row):
                continue
            if table.hot:
                self._add(_OF[table.name], (*row, change.cid) if table in _WITH_CID else row)
            else:
                self._add(_OF[table.name], (*row, change.cid, change.rev, change.seq))
            if table is POSTS:
                derive.added(effects, table, row, change.cid)
            elif table is GATES:
                self._gate(row)
        for quote in effects.quotes_added.values():
            self._add(_QUOTES, quote)
        for note in effects.notes_added.values():
            self._add(_NOTES, note)

    def end_repository(self) -> None:
        self._pairs.clear()
        self._paired = None

    def _is_twin(self, change: Change, row: Row) -> bool:
        """Keys come in order, so the first record of a pair has the lowest: it goes into the table."""
        if change.table is not self._paired:
            self._pairs.clear()
            self._paired = change.table
        pair = pair_of(change.table, row)
        if pair not in self._pairs:
            self._pairs.add(pair)
            return False
        values = (change.repo, change.uri, change.table.name, pair, change.rkey, change.rev, change.seq, change.cid)
        self._add(_TWINS, (*values, freeze(row)))
        return True

    def _gate(self, row: Row) -> None:
        if row[GATE.kind] == "post":
            self._add(_POST_GATES, post_gate_row(row))
        elif (shown := thread_gate_row(row)) is not None:
            self._add(_THREAD_GATES, shown)

    def _add(self, staged: Staged, row: Row) -> None:
        self._rows.setdefault(staged, []).append(row)
        self.count += 1

    def take(self) -> dict[Staged, list[Row]]:
        taken, self._rows, self.count = self._rows, {}, 0
        return taken


class Job(NamedTuple):
    """A repository to stage."""

    did: str
    file: str
    rev: str
    seq: int
    taken_at: Any


_CLAIM: Final = (
    "UPDATE fastworker.bulk_repos AS r SET state = 'staged' FROM (SELECT did FROM fastworker.bulk_repos "
    "WHERE state = 'waiting' ORDER BY did LIMIT $1 FOR UPDATE SKIP LOCKED) AS c WHERE r.did = c.did "
    "RETURNING r.did, r.file, r.rev, r.seq, r.taken_at"
)
_STAGED: Final = (
    "UPDATE fastworker.bulk_repos AS r SET records = u.records, later = coalesce(r.later, u.later) "
    "FROM unnest($1::varchar[], $2::bigint[], $3::text[]) AS u (did, records, later) WHERE r.did = u.did"
)


class Staging:
    """One process's connection. Everything between `begin` and `commit` is one transaction."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection
        self._transaction: Any = None

    async def begin(self) -> None:
        with translating():
            self._transaction = self._connection.transaction()
            await self._transaction.start()

    async def claim(self, many: int) -> list[Job]:
        with translating():
            return [Job(*row) for row in await self._connection.fetch(_CLAIM, many)]

    async def copy(self, rows: dict[Staged, list[Row]]) -> None:
        with translating():
            for staged, records in rows.items():
                await self._connection.copy_records_to_table(
                    staged.name, schema_name="fastworker", columns=staged.columns, records=records
                )

    async def commit(self, done: Sequence[tuple[str, int, str | None]]) -> None:
        """`done`: DIDs, how many records they have, and why they are settled later."""
        dids, records, later = zip(*done, strict=True) if done else ((), (), ())
        with translating():
            await self._connection.execute(_STAGED, list(dids), list(records), list(later))
            await self._transaction.commit()

    async def rollback(self) -> None:
        with translating():
            await self._transaction.rollback()

    async def refuse(self, did: str, why: str) -> None:
        with translating():
            await self._connection.execute(
                "UPDATE fastworker.bulk_repos SET state = 'refused', error = $2 WHERE did = $1", did, why[:500]
            )

    async def leave(self, dids: Sequence[str], why: str) -> None:
        with translating():
            await self._connection.execute(
                "UPDATE fastworker.bulk_repos SET state = 'staged', records = 0, later = coalesce(later, $2) "
                "WHERE did = ANY($1::varchar[]) AND state = 'waiting'",
                list(dids),
                why[:500],
            )

    def close(self) -> None:
        self._connection.terminate()


async def open_staging(database_url: str) -> Staging:
    """Raises StoreUnavailable."""
    with translating():
        connection = await asyncpg.connect(
            database_url,
            timeout=_CONNECT_S,
            command_timeout=660.0,
            server_settings={"application_name": "fastworker-bulk"},
        )
        await connection.execute(
            # A crash of the server may lose the newest transactions: then their repositories wait again.
            f"{NO_TRANSACTION_TIMEOUT}SET synchronous_commit = off; SET statement_timeout = '600s'; "
            f"SET TIME ZONE 'UTC'; SET idle_in_transaction_session_timeout = 0; {PATH}"
        )
    return Staging(connection)
