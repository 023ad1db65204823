"""PostgreSQL for `fastworker migrate`: what is there, and changing it in one transaction.

Decides nothing: store/migrate.py does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
import msgspec
from asyncpg.exceptions import InternalClientError

from fastworker.errors import ConfigError, ExitCode, FastworkerError, Unreachable, words_of
from fastworker.store.odd import BLOCKING, Odd
from fastworker.urls import place_of

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

CONNECT_SECONDS_MAX = 10.0
KNOWS_FLOORS = 0x66777266  # class of the advisory lock by which a session of ours says that it looks at floors; "fwrf"
AUTHORITY = "sslrootcert=FILE in DATABASE_URL"
STATEMENT_SECONDS_MAX = 600.0  # a guess: an index on a large table takes minutes
OPTION_REFUSED = {"42704", "42602", "22023", "55P02", "08P01"}
"""SQLSTATEs of a connection whose setting the server or a pooler does not know, or does not take from a client."""
LOCK_WAIT = "60s"  # another process migrates or grants; our migrations take about a second
ADVISORY_LOCK = 0x66617374776F726B  # "fastwork": one lock per database, held by whoever migrates or grants


NOT_CONNECTED = (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError, InternalClientError)

LOST = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError, InternalClientError)


def why_lost(error: Exception) -> str:
    """The driver's words about its own state, when a connection ends under it, say nothing to an operator."""
    return (
        "the connection ended while it was used"
        if isinstance(error, InternalClientError)
        else words_of(error, AUTHORITY)
    )


def in_one_line(error: asyncpg.PostgresError) -> str:
    """The server's words, without the full stop: its message, and DETAIL and HINT where it has them."""
    return "; ".join(line.partition(":  ")[2] or line for line in str(error).splitlines()).rstrip(".")


def not_connected(database_url: str, error: Exception) -> ConfigError | Unreachable:
    """What an error of a connection that was begun means to an operator."""
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate in OPTION_REFUSED:
        return ConfigError(f"DATABASE_URL cannot be used: PostgreSQL refuses one of its options: {error}")
    if isinstance(error, OSError | TimeoutError | asyncpg.PostgresError | InternalClientError):  # also a certificate
        return Unreachable(f"PostgreSQL at {place_of(database_url)} cannot be reached: {words_of(error, AUTHORITY)}")
    return ConfigError(f"DATABASE_URL cannot be used: {str(error).replace(chr(10), ' ')}")


class SchemaRefused(FastworkerError):
    """The database is not what this release can work with; nothing was changed."""

    exit_code = ExitCode.NO


class NotAllowed(SchemaRefused):
    """The role of DATABASE_URL may not do it: another role or more rights, not another try."""

    exit_code = ExitCode.USAGE


class Applied(msgspec.Struct, frozen=True):
    """One row of fastworker.migrations. `checksum` is the SHA-256 of the SQL in hex."""

    number: int
    name: str
    checksum: str
    adopted: bool  # the AppView had made these tables itself


class Schema(msgspec.Struct, frozen=True):
    """Names of public tables stand alone, ours are `fastworker.<name>`; types as format_type() writes them."""

    applied: list[Applied]
    columns: dict[str, dict[str, str]]
    uniques: dict[str, set[frozenset[str]]]  # column sets of complete (no predicate), valid, immediate unique indexes
    routines: dict[str, str | None]  # of schema fastworker: name to comment
    encoding: str
    odd: list[Odd] = []
    """What stands in the way, of any table."""


class SchemaAdmin:
    """One connection for as long as a migration or a check takes; store/tuning.py works on it, too."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """One transaction around everything inside; other processes that migrate or grant wait for its end."""
        async with self._transaction():
            await self.connection.execute("SELECT pg_advisory_xact_lock($1)", ADVISORY_LOCK)
            yield

    async def read(self) -> Schema:
        if self.connection.is_in_transaction():
            return await self._read()
        async with self._transaction():
            return await self._read()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        """Read committed: what others commit while we wait is seen. Begun with its settings in one message: a role's
        idle_in_transaction_session_timeout may end it before another arrives."""
        await self.connection.execute(
            f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{LOCK_WAIT}'; {_SETTINGS}"
        )
        try:
            yield
        except BaseException:
            with suppress(*NOT_CONNECTED):
                await self.connection.execute("ROLLBACK")
            raise
        await self.connection.execute("COMMIT")

    async def _read(self) -> Schema:
        fetch = self.connection.fetch
        columns: dict[str, dict[str, str]] = {}
        for table, column, type_ in await fetch(_COLUMNS):
            columns.setdefault(table, {})[column] = type_
        uniques: dict[str, set[frozenset[str]]] = {}
        for table, names in await fetch(_UNIQUES):
            uniques.setdefault(table, set()).add(frozenset(names))
        applied = []
        if "fastworker.migrations" in columns:
            applied = [
                Applied(number=row[0], name=row[1], checksum=row[2], adopted=row[3]) for row in await fetch(_APPLIED)
            ]
        routines = {row[0]: row[1] for row in await fetch(INSTALLED)}
        encoding = await self.connection.fetchval("SHOW server_encoding")
        odd = [Odd(*row) for row in await fetch(BLOCKING)]
        return Schema(applied=applied, columns=columns, uniques=uniques, routines=routines, encoding=encoding, odd=odd)

    async def grant(self, statements: str, role: str, password: str | None) -> None:
        """Run them; a password that is given is the role's from now on. Only inside `exclusive`."""
        await self.connection.execute(statements)
        if password is not None:
            quoted = await self.connection.fetchval("SELECT quote_literal($1::text)", password)
            await self.connection.execute(f"ALTER ROLE {role} PASSWORD {quoted}")

    async def apply(self, migration: Applied, sql: str) -> None:
        """Run the SQL unless the tables are adopted, and record it. Only inside `exclusive`."""
        await self.connection.execute(_RECORDS)
        if not migration.adopted:
            await self.connection.execute(sql)
        await self.connection.execute(
            "INSERT INTO fastworker.migrations (number, name, checksum, adopted) VALUES ($1, $2, $3, $4)",
            migration.number,
            migration.name,
            migration.checksum,
            migration.adopted,
        )

    async def install(self, sql: str) -> None:
        """Make or replace a routine. Only inside `exclusive`."""
        await self.connection.execute(sql)


@asynccontextmanager
async def open_schema(database_url: str) -> AsyncIterator[SchemaAdmin]:
    """Raises ConfigError (the URL), Unreachable (no connection, or lost), SchemaRefused (PostgreSQL says no)."""
    try:
        connection = await asyncpg.connect(
            database_url,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=STATEMENT_SECONDS_MAX,
            statement_cache_size=0,  # behind pgbouncer too
        )
    except NOT_CONNECTED as error:
        raise not_connected(database_url, error) from error
    where = place_of(database_url)
    try:
        yield SchemaAdmin(connection)
    except LOST as error:
        raise Unreachable(f"PostgreSQL at {where} was lost: {why_lost(error)}") from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise NotAllowed(
            f"PostgreSQL at {where}: {in_one_line(error)}. What a service's own role needs is what `fastworker grants "
            "worker` or `grants reader` prints; every other command runs as the owner of the tables."
        ) from error
    except asyncpg.PostgresError as error:
        raise SchemaRefused(f"PostgreSQL refused it, and nothing was changed: {in_one_line(error)}") from error
    finally:
        connection.terminate()


# What a role or a database may have set that changes how types are written and what SQL means. LOCAL: a pooler would
# give the settings of a session to others.
_SETTINGS = (
    "SET LOCAL search_path = public; SET LOCAL quote_all_identifiers = off; "
    "SET LOCAL standard_conforming_strings = on; SET LOCAL row_security = off; "
    "SET LOCAL statement_timeout = 0; "
    "SET LOCAL idle_in_transaction_session_timeout = 0; "
    "SELECT set_config('transaction_timeout', '0', true) WHERE current_setting('transaction_timeout', true) <> '0'"
)

_COLUMNS = """
SELECT CASE WHEN n.nspname = 'public' THEN '' ELSE n.nspname || '.' END || c.relname, a.attname,
       format_type(a.atttypid, a.atttypmod)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
WHERE n.nspname IN ('public', 'fastworker') AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
"""

_UNIQUES = """
SELECT CASE WHEN n.nspname = 'public' THEN '' ELSE n.nspname || '.' END || c.relname,
       array_agg(a.attname::text)
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
WHERE n.nspname IN ('public', 'fastworker') AND i.indisunique AND i.indisvalid AND i.indimmediate
  AND i.indpred IS NULL AND i.indexprs IS NULL
GROUP BY n.nspname, c.relname, i.indexrelid
"""

# Names and comments of our routines
INSTALLED = """
SELECT p.proname, obj_description(p.oid, 'pg_proc') FROM pg_proc p
JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'fastworker'
"""

_APPLIED = "SELECT number, name, checksum, adopted FROM fastworker.migrations ORDER BY number"

# Not IF NOT EXISTS for the schema: that asks for the right to create one even where it exists.
_RECORDS = """
DO $$
BEGIN
    IF to_regclass('fastworker.migrations') IS NULL THEN
        IF to_regnamespace('fastworker') IS NULL THEN
            CREATE SCHEMA fastworker;
        END IF;
        CREATE TABLE fastworker.migrations (
            number integer PRIMARY KEY,
            name text NOT NULL,
            checksum text NOT NULL,
            adopted boolean NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now()
        );
    END IF;
END
$$
"""
