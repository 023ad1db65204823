"""Sessions in PostgreSQL: how they are opened, what is set in them, and whose fault an error is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import asyncpg
from asyncpg.exceptions import (
    DeadlockDetectedError,
    DuplicatePreparedStatementError,
    InterfaceError,
    InternalClientError,
    InvalidSQLStatementNameError,
    PostgresError,
    ReadOnlySQLTransactionError,
    SerializationError,
    TargetServerAttributeNotMatched,
    UnsupportedClientFeatureError,
)
from asyncpg.pool import PoolConnectionProxy
from asyncpg.protocol import protocol

from fastworker.errors import RowRejected, StoreUnavailable, Unreachable, words_of
from fastworker.store.refusal import Whose, sentence, whose
from fastworker.store.schema_admin import AUTHORITY, KNOWS_FLOORS

Connection = PoolConnectionProxy  # asyncpg's: dead after release

APART_S = 10.0  # that a session which nobody needs any more is kept
POOLER = (
    "PostgreSQL is reached through a pooler that gives each transaction another session: set it to session mode "
    "(pgbouncer: pool_mode = session) or connect directly"
)

# The driver asks of each element of an array whether it is an array itself, through abstract classes: 0.6 us for each
# text, 1 us for each row (docs/performance.md). Our arrays are lists and tuples, so plain types answer it. If a later
# release of the driver has other names, this has no effect, and writing is that much slower.
for _name, _types in (("IterableABC", (list, tuple)), ("SizedABC", (list, tuple)), ("MappingABC", dict)):
    setattr(protocol, _name, _types)

# For statements of ours now() is PostgreSQL's, whatever a role has first in its path, which it keeps for its triggers.
PATH = (
    "SELECT set_config('search_path', concat_ws(', ', 'pg_catalog', nullif(current_setting('search_path'), '')), false)"
)
# From PostgreSQL 17 on. Early: it counts for what is sent with it.
NO_TRANSACTION_TIMEOUT = (
    "SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) <> '0'; "
)
# A plan made while a table was empty must not scan it when it is large: every statement of ours looks up keys. A role
# or a database may have settings that change what our statements mean, or end them early. All of it is sent after
# connecting: poolers refuse start-up parameters that they do not know. With row_security off a policy that would hide
# rows is an error: else a delete finds nothing, and is acknowledged.
STATEMENT_TIMEOUT = "SET statement_timeout = '60s'"
LOCK_TIMEOUT = "SET lock_timeout = '5s'"
SESSION = (
    f"{STATEMENT_TIMEOUT}; {NO_TRANSACTION_TIMEOUT}"
    f"{LOCK_TIMEOUT}; SET idle_in_transaction_session_timeout = '20s'; "
    "SET idle_session_timeout = 0; SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; "
    "SET enable_indexscan = on; SET enable_bitmapscan = on; SET enable_nestloop = on; SET enable_sort = on; "
    "SET jit = off; SET plan_cache_mode = force_generic_plan; SET TIME ZONE 'UTC'; SET DateStyle = 'ISO, MDY'; "
    "SET IntervalStyle = postgres; SET bytea_output = hex; SET standard_conforming_strings = on; SET array_nulls = on; "
    "SET transform_null_equals = off; SET quote_all_identifiers = off; SET row_security = off; "
    "SET default_transaction_isolation = 'read committed'; SET default_transaction_deferrable = off; "
    f"SELECT pg_advisory_lock_shared({KNOWS_FLOORS}, 1); " + PATH
)
# What was acknowledged must be on disk. Where it is `local` or more, somebody has chosen what that means.
DURABLE = "; SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"


class Time(NamedTuple):
    """How long a flush may take: each statement of it (None: what the session allows), and all of it, in seconds."""

    statement_s: float | None
    all_s: float


NO_HURRY = Time(statement_s=None, all_s=86_400)
HURRY = Time(statement_s=5, all_s=20)
"""For a piece of what was not done in time."""
ALONE = Time(statement_s=20, all_s=60)
"""For one row or entry of it."""


class Contended(Exception):
    """Another writer has changed what this transaction had read, and part of it is written: roll back, begin again."""


class RowsKept(RowRejected):
    """Something of the database's own keeps rows as they are, without an error.

    If it is a rule, a statement that was prepared meanwhile does nothing after the rule is gone, too: PostgreSQL does
    not see that its plan is out of date.
    """


RETRYABLE = (DeadlockDetectedError, SerializationError, Contended)


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Errors of driver and server become ours, by fault. What is left is our own bug and crashes.

    Raises RowRejected (a value was refused), StoreUnavailable (a state to wait out), Unreachable (a pooler that cannot
    be worked with). What is `RETRYABLE` passes.
    """
    try:
        yield
    except RETRYABLE:
        raise
    except (OverflowError, UnicodeError) as error:
        raise RowRejected(f"{type(error).__name__}: {error}") from error
    except InternalClientError as error:
        # the driver lost count of a connection that the server ended at the same moment; it is gone by now
        if isinstance(error, TargetServerAttributeNotMatched):
            raise StoreUnavailable("PostgreSQL: none of the hosts is what target_session_attrs asks for") from error
        raise StoreUnavailable("PostgreSQL connection: it was lost while another operation used it") from error
    except UnsupportedClientFeatureError as error:
        raise StoreUnavailable(f"PostgreSQL has a type that the driver does not know: {error}") from error
    except (DuplicatePreparedStatementError, InvalidSQLStatementNameError) as error:
        raise Unreachable(POOLER) from error
    except PostgresError as error:
        fault = whose(error)
        if fault is Whose.OURS:
            raise
        if fault is Whose.ROW:
            raise RowRejected(f"{type(error).__name__}: {error}") from error
        raise StoreUnavailable(sentence(error)) from error
    except RuntimeError as error:
        if "handler is closed" not in str(error):  # uvloop's, of a socket that was lost at that moment
            raise
        raise StoreUnavailable("PostgreSQL connection: closed while it was used") from error
    except InterfaceError as error:
        # the pool or the connection is closed under us; what closed it says more than what found it closed
        why = error.__context__ if isinstance(error.__context__, PostgresError | OSError) else error
        words = str(why) or type(why).__name__
        if "connection is closed" in words:  # the driver names the method of its own that found out
            words = "closed while it was used"
        raise StoreUnavailable(f"PostgreSQL connection: {words}") from error
    except (OSError, TimeoutError) as error:
        raise StoreUnavailable(f"PostgreSQL cannot be reached: {words_of(error, AUTHORITY)}") from error


class Pools(NamedTuple):
    """`flushes`: one connection for each. `apart`: one that is opened when it is needed, for what takes minutes."""

    flushes: asyncpg.Pool[Any]
    apart: asyncpg.Pool[Any]

    async def close(self) -> None:
        await self.apart.close()
        await self.flushes.close()

    def terminate(self) -> None:
        self.apart.terminate()
        self.flushes.terminate()


async def open_pools(
    database_url: str,
    *,
    size: int,
    application_name: str,
    connect_timeout_s: float,
    command_timeout_s: float,
    settings: str = SESSION + DURABLE,
    begin: Callable[[asyncpg.Connection[Any]], Awaitable[None]] | None = None,
) -> Pools:
    """Raises StoreUnavailable where the server cannot be reached or refuses, Unreachable for a transaction pooler.

    `size`: connections for flushes. `settings`: SQL that each new session begins with; `begin`: what is done then.
    """

    async def session(connection: asyncpg.Connection[Any]) -> None:
        await connection.execute(settings)
        if begin is not None:
            await begin(connection)

    async def keep(connection: asyncpg.Connection[Any]) -> None:
        """No reset between flushes: sessions hold nothing but settings, and it costs a round trip."""

    async def pool_of(connections: int, idle_s: float) -> asyncpg.Pool[Any]:
        return await asyncpg.create_pool(
            database_url,
            min_size=0,  # the pool would keep more alive by itself, and log a traceback for each failure
            max_size=connections,
            init=session,
            reset=keep,
            timeout=connect_timeout_s,
            command_timeout=command_timeout_s,
            max_inactive_connection_lifetime=idle_s,
            server_settings={"application_name": application_name},
        )

    with translating():
        pools = Pools(await pool_of(size, 0), await pool_of(1, APART_S))
        try:
            async with contextlib.AsyncExitStack() as stack:
                pool = pools.flushes
                first = await stack.enter_async_context(pool.acquire(timeout=connect_timeout_s))
                if size > 1:
                    second = await stack.enter_async_context(pool.acquire(timeout=connect_timeout_s))
                    await _refuse_pooler(first, second)
                else:  # for this once
                    another = await asyncpg.connect(database_url, timeout=connect_timeout_s, command_timeout=10)
                    stack.push_async_callback(another.close, timeout=5)
                    await _refuse_pooler(first, another)
        except BaseException:
            pools.terminate()
            raise
    return pools


@contextlib.asynccontextmanager
async def borrow(pool: asyncpg.Pool[Any]) -> AsyncIterator[Connection]:
    """A connection of the pool, with errors translated; one that is of no more use is closed instead of given back."""
    with translating():
        async with _acquired(pool) as connection:
            try:
                yield connection
            except Exception as error:
                # it lost count, leads to what is a replica now, has plans that do nothing, or the server went before
                # the rollback
                useless = isinstance(error, InternalClientError | ReadOnlySQLTransactionError | RowsKept)
                if useless or _is_left_open(connection):
                    connection.terminate()
                raise


@contextlib.asynccontextmanager
async def hurried(db: Connection, statement_s: float | None) -> AsyncIterator[None]:
    """Statements end earlier than usual. A lock is waited for a shorter time still: so that it shows which it was."""
    if statement_s is None:
        yield
        return
    lock_s = min(5, statement_s / 2)
    await db.execute(f"SET statement_timeout = {statement_s * 1000:.0f}; SET lock_timeout = {lock_s * 1000:.0f}")
    try:
        yield
    except PostgresError:
        if not db.is_closed():
            await db.execute(f"{STATEMENT_TIMEOUT}; {LOCK_TIMEOUT}")
        raise
    except BaseException:  # cut off: nobody knows what it is at
        db.terminate()
        raise
    await db.execute(f"{STATEMENT_TIMEOUT}; {LOCK_TIMEOUT}")


@contextlib.asynccontextmanager
async def _acquired(pool: asyncpg.Pool[Any]) -> AsyncIterator[Connection]:
    try:
        connection = await pool.acquire(timeout=10)
    except TimeoutError as error:
        if pool.get_idle_size():
            raise
        raise StoreUnavailable(f"All {pool.get_size()} connections are at work, or wait for locks") from error
    try:
        yield connection
    finally:
        await pool.release(connection)


def _is_left_open(connection: Connection) -> bool:
    try:
        return bool(connection.is_in_transaction())
    except (InterfaceError, AttributeError):  # it is gone already
        return False


async def _refuse_pooler(*connections: Connection | asyncpg.Connection[Any]) -> None:
    """Two connections that share one session are a pooler's that we cannot work with."""
    pids = {await connection.fetchval("SELECT pg_backend_pid()") for connection in connections}
    if len(pids) < len(connections):
        raise Unreachable(POOLER)
