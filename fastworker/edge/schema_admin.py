"""PostgreSQL for `fastworker migrate`: what is there, and changing it in one transaction.

Decides nothing: run/migrate.py does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
import msgspec

from fastworker.errors import ConfigError, ExitCode, FastworkerError, Unreachable, words_of

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

CONNECT_SECONDS_MAX = 10.0
AUTHORITY = "sslrootcert=FILE in DATABASE_URL"
STATEMENT_SECONDS_MAX = 600.0  # a guess: an index on a large table takes minutes
LOCK_WAIT = "60s"  # another process migrates; our migrations take about a second
ADVISORY_LOCK = 0x66617374776F726B  # "fastwork": one lock per database, held by whoever migrates


class SchemaRefused(FastworkerError):
    """The database is not what this release can work with; nothing was changed."""

    exit_code = ExitCode.NO


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
    uniques: dict[str, set[frozenset[str]]]  # column sets of complete (no predicate), valid unique indexes


class SchemaAdmin:
    """One connection for as long as a migration or a check takes; edge/tuning.py works on it, too."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """One transaction around everything inside; other processes that migrate wait for its end."""
        async with self.connection.transaction():
            await self.connection.execute(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'; SET LOCAL search_path = public")
            await self.connection.execute("SELECT pg_advisory_xact_lock($1)", ADVISORY_LOCK)
            yield

    async def read(self) -> Schema:
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
        return Schema(applied=applied, columns=columns, uniques=uniques)

    async def grant(self, statements: str, role: str, password: str | None) -> None:
        """Run what `fastworker grants` prints; a password that is given is the role's from now on."""
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


@asynccontextmanager
async def open_schema(database_url: str) -> AsyncIterator[SchemaAdmin]:
    """Raises ConfigError (the URL), Unreachable (no connection, or lost), SchemaRefused (PostgreSQL says no)."""
    try:
        where = urlsplit(database_url).hostname or "its socket"
        connection = await asyncpg.connect(
            database_url,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=STATEMENT_SECONDS_MAX,
            statement_cache_size=0,  # behind pgbouncer too
        )
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:  # a bad certificate is a ValueError, too
        raise Unreachable(f"PostgreSQL at {where} cannot be reached: {words_of(error, AUTHORITY)}") from error
    except (ValueError, asyncpg.InterfaceError) as error:
        raise ConfigError(f"DATABASE_URL cannot be used: {str(error).replace(chr(10), ' ')}") from error
    try:
        yield SchemaAdmin(connection)
    except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError) as error:
        raise Unreachable(f"PostgreSQL at {where} was lost: {str(error) or type(error).__name__}") from error
    except asyncpg.PostgresError as error:
        raise SchemaRefused(f"PostgreSQL refused the migration, nothing was changed: {error}") from error
    finally:
        connection.terminate()


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
WHERE n.nspname IN ('public', 'fastworker') AND i.indisunique AND i.indisvalid
  AND i.indpred IS NULL AND i.indexprs IS NULL
GROUP BY n.nspname, c.relname, i.indexrelid
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
