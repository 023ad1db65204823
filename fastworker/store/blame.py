"""Whose fault a refused flush is: a row's, or the database's state. A control record of ours decides.

Where the database refuses records of ours as well, written in the same way into the same tables and taken back, no row
is at fault: it is waited for. Where it takes them, the refused rows are at fault, and are found by halving the batch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

import msgspec
from asyncpg.exceptions import PostgresError

from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.store import statements as sql
from fastworker.store.effects import write_effects
from fastworker.store.flush import put_rows
from fastworker.store.refusal import OUT_OF_TIME, foreign_code, sentence
from fastworker.store.session import RETRYABLE, Connection
from fastworker.store.writer import Writer
from fastworker.table import control
from fastworker.table.derive import Effects

CONTROL_S = 20  # a statement of a control record
STRING_TOO_LONG, LOCK_TIMEOUT = "22001", "55P03"
_RENAME = "UPDATE public.users SET handle = $2 WHERE did = $1"
Connect = Callable[[], AbstractAsyncContextManager[Connection]]


_TUPLE = re.compile(r"(\(\d+,\d+\))[^\"«„]*[\"«„]([^\"»“]+)[\"»“]")  # a lock's context, in any language


class LockedRow(msgspec.Struct, frozen=True):
    """A row that another transaction has locked: its table, where it is, and what its key begins with."""

    table: str
    place: str
    column: str
    key: str


class RowLocked(StoreUnavailable):
    """Another transaction has locked this row: what does not touch it can be written."""

    def __init__(self, words: str, row: LockedRow) -> None:
        super().__init__(words)
        self.row = row


class TooSlow(StoreUnavailable):
    """A batch was not done in time while a control record was: something in it is slow, or needs what others do not.

    `is_contents`: code of the database's own ran out of time, so it may be what one row says, for ever.
    `is_ended`: PostgreSQL ended it; else we did, and a commit may be on its way.
    """

    def __init__(self, words: str, *, is_contents: bool, is_ended: bool = True) -> None:
        super().__init__(words)
        self.is_contents = is_contents
        self.is_ended = is_ended


class _RolledBack(Exception):
    """Raised to roll a transaction back."""


async def not_in_time(
    writer: Writer, connect: Connect, tables: set[str], error: StoreUnavailable | TimeoutError
) -> StoreUnavailable:
    """What it means that a batch of rows in these tables was not written.

    RowLocked: another transaction has locked a row; TooSlow: it was not done in time, and a control record is;
    `error` itself, where it is something else.
    """
    cause = error.__cause__
    state = getattr(cause, "sqlstate", None)
    if state not in OUT_OF_TIME and isinstance(error, StoreUnavailable):
        return error
    words = str(error) or "PostgreSQL: a flush was not done in time"
    if state == LOCK_TIMEOUT:
        words = f"{words.removesuffix('.')}. {await who_locks(connect)}"
        if (row := await _locked_row(connect, cause)) is not None:
            return RowLocked(words, row)
    try:
        await refuse_state(writer, connect, tables, error)
    except StoreUnavailable:
        return StoreUnavailable(words)
    is_contents = isinstance(cause, PostgresError) and state != LOCK_TIMEOUT and foreign_code(cause) is not None
    return TooSlow(words, is_contents=is_contents, is_ended=state is not None)


async def _locked_row(connect: Connect, cause: BaseException | None) -> LockedRow | None:
    """Which row a statement has waited for; None where it was a whole table, or a row that nobody can see."""
    context = getattr(cause, "context", None) or ""
    found = _TUPLE.search(context.partition("\n")[0])
    if found is None:
        return None
    with contextlib.suppress(StoreUnavailable):
        async with connect() as db:
            if (key := await db.fetchrow(sql.FIRST_OF_KEY, found[2])) is not None:
                table, column = key
                text = await db.fetchval(sql.KEY_AT.format(table=table, column=column, place=found[1]))
                return None if text is None else LockedRow(table, found[1], column, text)
    return None


async def still_locked(db: Connection, rows: list[LockedRow]) -> set[LockedRow]:
    """Which of these rows another transaction still has locked."""
    locked = set()
    for row in rows:
        key = sql.KEY_AT.format(table=row.table, column=row.column, place=row.place)
        is_there = await db.fetchval(key) == row.key
        if is_there and await db.fetchval(f"{key} FOR UPDATE SKIP LOCKED") is None:
            locked.add(row)
    return locked


async def who_locks(connect: Connect) -> str:
    """Of the transactions that hold locks on the tables, the oldest that is not ours, as a sentence."""
    with contextlib.suppress(StoreUnavailable):
        async with connect() as db:
            if held := await db.fetchval(sql.WHO_LOCKS):
                return f"A lock is held by {held}"
    return "Nobody holds a lock any more"


async def refuse_state(writer: Writer, connect: Connect, tables: set[str], error: Exception) -> None:
    """Raise StoreUnavailable where the database refuses rows of ours as well; `error`: what it said of the batch."""
    is_wide = getattr(error.__cause__, "sqlstate", None) == STRING_TOO_LONG
    try:
        async with connect() as db:
            await _write_control(writer, db, tables, wide=is_wide)
    except RowRejected as refused:
        cause = refused.__cause__
        words = sentence(cause) if isinstance(cause, PostgresError) else f"PostgreSQL: {refused}"
        # mutant: a refusal of state is isolated
        raise StoreUnavailable(words) from refused
    except RETRYABLE as lost:
        raise StoreUnavailable(f"PostgreSQL: {lost}") from lost


async def _write_control(writer: Writer, db: Connection, tables: set[str], *, wide: bool) -> None:
    """Write control records into these tables, as any other record, and take them back."""
    async with _taken_back(db):
        await db.execute(f"SET LOCAL statement_timeout = '{CONTROL_S}s'")
        for changes, dids in control.steps(tables, datetime.now(UTC), wide=wide):
            effects = Effects(writer.derive)
            await db.execute(sql.USERS, dids)
            await db.execute(_RENAME, control.FULL, "control.invalid")
            await put_rows(writer, db, changes, set(), effects)
            await write_effects(writer, db, effects)
        await db.execute("SET CONSTRAINTS ALL IMMEDIATE")


@contextlib.asynccontextmanager
async def _taken_back(db: Connection) -> AsyncIterator[None]:
    with contextlib.suppress(_RolledBack):
        async with db.transaction():
            yield
            raise _RolledBack
