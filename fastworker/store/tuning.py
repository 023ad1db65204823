"""PostgreSQL for `fastworker migrate --tune`: storage parameters and indexes, each change remembered with its undoing.

`fastworker.tuning` has one row per change that is in force; it is made with the first and goes with the last.
Decides nothing: commands/tune.py does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

import asyncpg
import msgspec

from fastworker.store.schema_admin import SchemaAdmin, SchemaRefused, open_schema
from fastworker.table.schema import qualified

INDEX_SECONDS_MAX = 86_400.0  # a guess: an index over a billion rows takes hours
TRANSACTIONS_WAIT = "600s"  # CONCURRENTLY waits for every transaction that began before it


class Table(msgspec.Struct, frozen=True):
    owner: str
    owned: bool  # the role is the owner, a member of it or a superuser
    partitioned: bool  # has no storage: its parameters are those of its partitions
    parameters: dict[str, str]


class Index(msgspec.Struct, frozen=True):
    table: str
    name: str
    columns: tuple[str, ...]
    keys: tuple[str, ...]  # columns with operator class, collation and order: what two indexes must share
    definition: str
    whole: bool  # a valid B-tree over plain columns of all rows
    loose: bool  # nothing but speed depends on it: not unique, of no constraint, not clustered, no replica identity
    valid: bool
    bytes_used: int
    scans: int


class Remembered(msgspec.Struct, frozen=True):
    """One change in force: a parameter's value, or the definition of an index that was dropped."""

    kind: str  # parameter, index
    table: str
    name: str
    value: str


class Server(msgspec.Struct, frozen=True):
    """How the server is set. Memory and disk are known where it runs on this machine; None elsewhere."""

    settings: dict[str, tuple[int | str, str]]
    """The number in the unit of pg_settings (or the word), and how SHOW writes it."""
    memory_bytes: int | None = None
    disk_free_bytes: int | None = None
    counters_tuned: bool = True
    """The counters' table has a vacuum of its own, as `migrate --tune` gives it."""


class Tunable(msgspec.Struct, frozen=True):
    role: str
    may_remember: bool
    may_index: bool  # PostgreSQL asks for CREATE on the schema when an index is made again
    tables: dict[str, Table]
    indexes: list[Index]
    remembered: list[Remembered]
    server: Server


class Tuning:
    """What can be changed about tables that others made, one change at a time."""

    def __init__(self, schema: SchemaAdmin) -> None:
        self._schema = schema
        self._connection = schema.connection

    async def read(self, tables: Sequence[str]) -> Tunable:
        fetch = self._connection.fetch
        with _refusals("Nothing was changed"):
            role = await self._connection.fetchrow(_ROLE)
            assert role is not None
            return Tunable(
                role=role["role"],
                may_remember=role["may_remember"],
                may_index=role["may_index"],
                tables={
                    row["name"]: Table(
                        owner=row["owner"],
                        owned=row["owned"],
                        partitioned=row["partitioned"],
                        parameters=dict(option.split("=", 1) for option in row["options"]),
                    )
                    for row in await fetch(_TABLES, list(tables))
                },
                indexes=[
                    Index(**{**row, "columns": tuple(row["columns"]), "keys": tuple(row["keys"])})
                    for row in await fetch(_INDEXES, list(tables))
                ],
                remembered=[Remembered(*row) for row in await fetch(_REMEMBERED)] if role["remembers"] else [],
                server=await self.read_server(),
            )

    async def read_server(self) -> Server:
        row = await self._connection.fetchrow(_SERVER)
        assert row is not None
        settings = {
            name: (int(setting) if setting.isdigit() else setting, shown)
            for name, setting, shown in await self._connection.fetch(_SETTINGS)
        }
        memory = disk = None
        if row["is_here"]:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            with suppress(OSError):
                disk = shutil.disk_usage(row["directory"] or "/").free
        return Server(settings, memory, disk, row["counters_tuned"])

    async def set_parameters(self, wanted: Mapping[str, Mapping[str, str]]) -> None:
        """All of them or none. Reads and writes go on; a running VACUUM of a table is waited for."""
        with _refusals("No storage parameter was changed"):
            async with self._schema.exclusive():
                await self._connection.execute(_REMEMBERS)
                for table, values in sorted(wanted.items()):
                    for name, value in values.items():
                        await self._remember(Remembered("parameter", table, name, value))
                    await self._connection.execute(set_sql(table, values))

    async def reset_parameters(self, reset: Mapping[str, Sequence[str]], forget: Sequence[Remembered]) -> None:
        with _refusals("No storage parameter was changed"):
            async with self._schema.exclusive():
                for table, names in sorted(reset.items()):
                    await self._connection.execute(reset_sql(table, names))
                for change in forget:
                    await self._forget(change)

    async def drop_index(self, index: Index) -> None:
        """Remembered first: a drop that was interrupted can be finished or undone."""
        with _refusals(f"The index {index.name} stays, or is left invalid: run the same command again"):
            async with self._schema.exclusive():
                await self._connection.execute(_REMEMBERS)
                await self._remember(Remembered("index", index.table, index.name, index.definition))
            await self._concurrently(drop_sql(index.name))

    async def create_index(self, change: Remembered, *, broken: bool) -> None:
        """`broken`: an invalid one of that name is there, from a creation or a drop that was interrupted."""
        with _refusals(f"The index {change.name} is not there yet: run the same command again"):
            if broken:
                await self._concurrently(drop_sql(change.name))
            await self._concurrently(create_sql(change.value))
            await self._forget(change)

    async def forget(self, change: Remembered) -> None:
        with _refusals("Nothing was changed"):
            await self._forget(change)

    async def forget_all(self) -> None:
        """Nothing is in force any more: the table that remembers goes, too."""
        with _refusals("Everything is undone, but the table fastworker.tuning stays"):
            await self._connection.execute("DROP TABLE IF EXISTS fastworker.tuning")

    async def _remember(self, change: Remembered) -> None:
        await self._connection.execute(_REMEMBER, change.kind, change.table, change.name, change.value)

    async def _forget(self, change: Remembered) -> None:
        await self._connection.execute(_FORGET, change.kind, change.table, change.name)

    async def _concurrently(self, statement: str) -> None:
        """Outside a transaction, as PostgreSQL demands."""
        await self._connection.execute(f"SET lock_timeout = '{TRANSACTIONS_WAIT}'")
        await self._connection.execute(statement, timeout=INDEX_SECONDS_MAX)


def set_sql(table: str, values: Mapping[str, str]) -> str:
    return f"ALTER TABLE {qualified(table)} SET ({', '.join(f'{name} = {value}' for name, value in values.items())})"


def reset_sql(table: str, names: Sequence[str]) -> str:
    return f"ALTER TABLE {qualified(table)} RESET ({', '.join(names)})"


def drop_sql(index: str) -> str:
    quoted = index.replace('"', '""')
    return f'DROP INDEX CONCURRENTLY IF EXISTS public."{quoted}"'


def create_sql(definition: str) -> str:
    return definition.replace("CREATE INDEX ", "CREATE INDEX CONCURRENTLY ", 1)


@asynccontextmanager
async def open_tuning(database_url: str) -> AsyncIterator[Tuning]:
    """Raises ConfigError, Unreachable and SchemaRefused, as `open_schema` does."""
    async with open_schema(database_url) as schema:
        yield Tuning(schema)


@contextmanager
def _refusals(state: str) -> Iterator[None]:
    """PostgreSQL's own words, after what the database is now like. A lost connection is open_schema's."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise SchemaRefused(
            f"{state}; a VACUUM, another change of the table or a long transaction was in the way: {error}"
        ) from error
    except asyncpg.PostgresConnectionError:
        raise
    except asyncpg.PostgresError as error:
        raise SchemaRefused(f"{state}; PostgreSQL refused: {error}") from error


_NAME = "CASE WHEN n.nspname = 'public' THEN '' ELSE n.nspname || '.' END || c.relname"

_ROLE = """
SELECT current_user::text AS role, to_regclass('fastworker.tuning') IS NOT NULL AS remembers,
       COALESCE(CASE WHEN to_regclass('fastworker.tuning') IS NULL
                     THEN has_schema_privilege(to_regnamespace('fastworker')::oid, 'CREATE')
                     ELSE pg_has_role((SELECT relowner FROM pg_class WHERE oid = to_regclass('fastworker.tuning')),
                                      'USAGE') END, false) AS may_remember,
       has_schema_privilege('public', 'CREATE') AS may_index
"""

_TABLES = f"""
SELECT {_NAME} AS name, pg_get_userbyid(c.relowner)::text AS owner, pg_has_role(c.relowner, 'USAGE') AS owned,
       c.relkind = 'p' AS partitioned, COALESCE(c.reloptions, '{{}}') AS options
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('public', 'fastworker') AND c.relkind IN ('r', 'p') AND {_NAME} = ANY ($1::text[])
"""

_INDEXES = """
SELECT c.relname::text AS "table", x.relname::text AS name, pg_get_indexdef(i.indexrelid) AS definition,
       ARRAY(SELECT a.attname::text FROM generate_series(0, i.indnkeyatts - 1) AS k
             JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[k] ORDER BY k) AS columns,
       ARRAY(SELECT concat_ws(' ', i.indkey[k], i.indclass[k], i.indcollation[k], i.indoption[k])
             FROM generate_series(0, i.indnkeyatts - 1) AS k ORDER BY k) AS keys,
       m.amname = 'btree' AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AS whole,
       m.amname = 'btree' AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indnatts = i.indnkeyatts
       AND NOT (i.indisunique OR i.indisexclusion OR i.indisclustered OR i.indisreplident) AND NOT x.relispartition
       AND NOT EXISTS (SELECT FROM pg_constraint o WHERE o.conindid = i.indexrelid) AS loose,
       i.indisvalid AS valid, pg_relation_size(i.indexrelid) AS bytes_used, COALESCE(s.idx_scan, 0) AS scans
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid
JOIN pg_am m ON m.oid = x.relam LEFT JOIN pg_stat_all_indexes s ON s.indexrelid = i.indexrelid
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname = ANY ($1::text[])
ORDER BY c.relname, x.relname
"""

# `is_here`: a Unix socket, or both ends of the connection have one address.
_SERVER = """
SELECT inet_server_addr() IS NOT DISTINCT FROM inet_client_addr() AS is_here,
       CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') THEN current_setting('data_directory') END AS directory,
       COALESCE((SELECT COALESCE(reloptions::text, '') LIKE '%autovacuum_vacuum_scale_factor%' FROM pg_class
                 WHERE oid = to_regclass('public.post_aggregations')), true) AS counters_tuned
"""

_SETTINGS = """
SELECT name, setting, current_setting(name) FROM pg_settings
WHERE name IN ('shared_buffers', 'max_wal_size', 'checkpoint_timeout', 'wal_compression')
"""

_REMEMBERED = "SELECT kind, table_name, name, value FROM fastworker.tuning ORDER BY kind DESC, table_name, name"

_REMEMBERS = """
CREATE TABLE IF NOT EXISTS fastworker.tuning (
    kind text NOT NULL,
    table_name text NOT NULL,
    name text NOT NULL,
    value text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, table_name, name)
)
"""

_REMEMBER = """
INSERT INTO fastworker.tuning (kind, table_name, name, value) VALUES ($1, $2, $3, $4)
ON CONFLICT (kind, table_name, name) DO UPDATE SET value = excluded.value, applied_at = now()
"""

_FORGET = "DELETE FROM fastworker.tuning WHERE kind = $1 AND table_name = $2 AND name = $3"
