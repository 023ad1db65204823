"""PostgreSQL as an operator sees it: version, limits, rights, clock, who else is there. Reads only; decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec

from fastworker.errors import Unreachable
from fastworker.store.odd import UNSAFE, Odd, remarks
from fastworker.store.schema_admin import LOST, NOT_CONNECTED, not_connected, why_lost
from fastworker.store.statements import FOLLOWED
from fastworker.urls import place_of

CONNECT_SECONDS_MAX = 10.0
STATEMENT_SECONDS_MAX = 30.0
LOOKS = 25
"""How often it is looked who writes: a statement of another writer is seen only while it runs."""
LOOK_EVERY_S = 0.04


class Client(msgspec.Struct, frozen=True):
    """Sessions of one client that is not fastworker, on the whole server."""

    name: str
    sessions: int


class Sequence(msgspec.Struct, frozen=True):
    """Ids that a column takes: the last one, and the highest that sequence and column hold."""

    name: str
    table: str
    column: str
    last: int
    limit: int


class Facts(msgspec.Struct, frozen=True):
    """`connections` are those of everybody now; `clock_ahead_s`: of the server against this machine."""

    version_num: int
    version: str
    max_connections: int
    reserved_connections: int
    connections: int
    own_connections: int
    """Of them, fastworker's: services that run already."""
    in_recovery: bool
    read_only: bool
    encoding: str
    role: str
    superuser: bool
    synchronous_commit: str
    fsync: str
    autovacuum: str
    connection_limit: int  # of this role or database; -1: none
    clock_ahead_s: float
    lacking: tuple[str, ...]
    """Rights that the worker needs on tables that exist and this role does not have."""
    hidden: tuple[str, ...]
    """Tables of these with row-level security that counts for this role."""
    pooler: bool
    """The server does not keep what a session sets: pgbouncer in transaction mode is in between."""
    may_read_schema: bool = True
    clients: tuple[Client, ...] = ()
    """Who else is connected, the one with the most sessions first."""
    sequences: tuple[Sequence, ...] = ()
    """Of those tables in which the role needs rights."""
    remarks: tuple[str, ...] = ()
    """What is unsafe about these tables, as sentences."""


class Past(msgspec.Struct, frozen=True):
    """What an earlier system left in the tables, and whether this one has begun."""

    relay_cursor: str | None
    """Of the TypeScript reader, which keeps it in `firehose_cursor`."""
    has_progress: bool
    avatars: int
    """How many avatars were looked at, and how many of them are in a form that only old Python workers wrote."""
    avatars_old: int
    late: int = 0
    """Pieces of maintenance that failed and are tried again ever more rarely, and why the first did."""
    late_error: str | None = None
    refused: int = 0
    """Records that are kept by name only."""


@asynccontextmanager
async def _connection(database_url: str, application_name: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """One connection for one look, with the driver's errors as ours."""
    try:
        connection = await asyncpg.connect(
            database_url,
            timeout=CONNECT_SECONDS_MAX,
            command_timeout=STATEMENT_SECONDS_MAX,
            statement_cache_size=0,  # behind pgbouncer too
            server_settings={"application_name": application_name},
        )
    except NOT_CONNECTED as error:
        raise not_connected(database_url, error) from error
    try:
        # Only where the server has an unusually short one: a pooler would pass the setting on to other clients.
        await connection.execute(
            "SELECT set_config('statement_timeout', '60s', false) WHERE current_setting('statement_timeout') LIKE '%ms'"
        )
        yield connection
    except (*LOST, asyncpg.PostgresError) as error:
        raise Unreachable(f"{name_of(database_url)}: {why_lost(error)}") from error
    finally:
        connection.terminate()


async def finished_seq(database_url: str, streams: Iterable[str], host: str, partitions: int = 1) -> int | None:
    """Up to which seq of `host` everything is in the tables; None when nobody knows.

    `streams`: those of all partitions that there may be; of these the lowest, if the first `partitions` are known. None
    also when the tables were fed from another relay: its numbers mean nothing here.
    """
    async with _connection(database_url, "fastworker-reader") as connection:
        if await connection.fetchval("SELECT to_regnamespace('fastworker')") is None:
            return None
        seq: int | None = await connection.fetchval(_FINISHED, list(streams), host, partitions)
        return seq


async def followed(database_url: str, dids: Collection[str]) -> list[str]:
    """Whom these accounts follow, as far as the tables know. Raises ConfigError and Unreachable."""
    async with _connection(database_url, "fastworker-reader") as connection:
        return [row[0] for row in await connection.fetch(FOLLOWED, list(dids))]


async def note_floor(database_url: str, streams: Iterable[str], seq: int) -> None:
    """Nothing up to `seq` was ever on these streams, which begin now. Raises ConfigError and Unreachable."""
    async with _connection(database_url, "fastworker-reader") as connection:
        if await connection.fetchval("SELECT to_regnamespace('fastworker')") is not None:
            await connection.execute(_NOTE_FLOOR, list(streams), seq)


async def note_gap(database_url: str, relay: str, after: int, until: int) -> None:
    """Record a gap: a relay's events after `after`, up to `until`. Raises ConfigError and Unreachable."""
    async with _connection(database_url, "fastworker-reader") as connection:
        await connection.execute(_NOTE_GAP, relay, after, until)


async def facts(database_url: str, rights: Mapping[str, Collection[str]]) -> Facts:
    """Look once; `rights` that are needed, by table. Raises ConfigError and Unreachable."""
    async with _connection(database_url, "fastworker-check") as connection:
        before = time.time()
        row = await connection.fetchrow(_FACTS)
        after = time.time()
        assert row is not None
        pairs = [(table, right) for table, some in rights.items() for right in some]
        lacking = [
            f"{some} on {table}"
            for table, some in await connection.fetch(_LACKING, *map(list, zip(*pairs, strict=True)))
        ]
        if not row["usage"]:
            lacking.insert(0, "USAGE on schema fastworker")
        hidden = await connection.fetchval(_HIDDEN, list(rights))
        clients = await connection.fetch(_CLIENTS)
        sequences = await connection.fetch(_SEQUENCES, list(rights))
        unsafe = [Odd(*one) for one in await connection.fetch(UNSAFE)]
        await connection.execute("SET fastworker.probe = 'kept'")
        kept = await connection.fetchval("SELECT current_setting('fastworker.probe', true)")
    return Facts(
        version_num=row["version_num"],
        version=row["version"],
        max_connections=row["max_connections"],
        reserved_connections=row["reserved"],
        connections=row["connections"],
        own_connections=row["own_connections"],
        in_recovery=row["in_recovery"],
        read_only=row["read_only"] == "on",
        encoding=row["encoding"],
        role=row["role"],
        superuser=row["superuser"],
        synchronous_commit=row["synchronous_commit"],
        fsync=row["fsync"],
        autovacuum=row["autovacuum"],
        connection_limit=row["connection_limit"],
        clock_ahead_s=float(row["now"]) - (before + after) / 2,
        lacking=tuple(lacking),
        hidden=tuple(hidden),
        pooler=kept != "kept",
        may_read_schema=row["usage"],
        clients=tuple(Client(*client) for client in clients),
        sequences=tuple(Sequence(*one) for one in sequences),
        remarks=tuple(remarks(unsafe, rights)),
    )


async def writers(database_url: str, tables: Collection[str]) -> list[str]:
    """Clients other than fastworker that were seen writing to one of these tables within about a second."""
    seen: dict[str, None] = {}
    async with _connection(database_url, "fastworker-check") as connection:
        for _ in range(LOOKS):
            seen |= dict.fromkeys(row[0] for row in await connection.fetch(_WRITERS, list(tables)))
            await asyncio.sleep(LOOK_EVERY_S)
    return sorted(seen)


async def past(database_url: str, stream_key: str) -> Past:
    """Only to be asked where the schema is complete."""
    async with _connection(database_url, "fastworker-check") as connection:
        cursor = await connection.fetchval(_OLD_CURSOR) if await connection.fetchval(_MAY_READ_CURSOR) else None
        row = await connection.fetchrow(_PAST, stream_key)
    assert row is not None
    return Past(cursor, *row)


def name_of(database_url: str) -> str:
    """The server without user and password, for a sentence."""
    return f"PostgreSQL at {place_of(database_url)}"


# $1: the streams of all partitions that there may be.
_FINISHED = """
SELECT CASE WHEN count(*) FILTER (WHERE number <= $3) = $3 THEN
-- mutant: the reader resumes from the furthest partition
    min(seq)
END
FROM (
    SELECT DISTINCT ON (number) number, seq FROM fastworker.progress
    JOIN unnest($1::text[]) WITH ORDINALITY AS partition (stream, number) USING (stream)
    WHERE seq IS NOT NULL
      AND NOT EXISTS (SELECT FROM fastworker.relays WHERE host <> $2)
    ORDER BY number, string_to_array(entry_id, '-')::numeric[] DESC
) AS partitions
"""

_NOTE_FLOOR = """
INSERT INTO fastworker.progress (stream, consumer, seq, entry_id)
SELECT stream, 'reader', $2, '0-1' FROM unnest($1::text[]) AS stream
WHERE NOT EXISTS (SELECT FROM fastworker.progress AS p WHERE p.stream = stream.stream)
ON CONFLICT DO NOTHING
"""

_NOTE_GAP = """
INSERT INTO fastworker.gaps AS g (relay, from_seq, to_seq) VALUES ($1, $2, $3)
ON CONFLICT (relay, from_seq) DO UPDATE SET to_seq = greatest(g.to_seq, excluded.to_seq), seen_at = now()
"""

# backend_type is not told of sessions of other roles, unless this one may see all statistics.
_SESSIONS = """(SELECT * FROM pg_stat_activity WHERE backend_type = 'client backend'
    OR (backend_type IS NULL AND usesysid IS NOT NULL))"""
_NAME = """COALESCE(NULLIF(a.application_name, ''), 'a client') || ' as ' || a.usename
    || COALESCE(' from ' || host(a.client_addr), '')"""

_CLIENTS = f"""
SELECT {_NAME}, count(*)::int FROM {_SESSIONS} AS a WHERE a.application_name NOT LIKE 'fastworker%'
GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 10
"""

# Without the right to read it, a sequence's last value is NULL.
_SEQUENCES = """
SELECT s.sequencename, c.relname, a.attname, s.last_value,
       least(s.max_value, CASE a.atttypid WHEN 'int4'::regtype THEN 2147483647 WHEN 'int2'::regtype THEN 32767
                          ELSE s.max_value END)
FROM pg_sequences s JOIN pg_class q ON q.oid = format('%I.%I', s.schemaname, s.sequencename)::regclass
JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = q.oid AND d.deptype IN ('a', 'i')
JOIN pg_class c ON c.oid = d.refobjid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
WHERE s.schemaname = 'public' AND c.relname = ANY ($1::text[]) AND s.last_value IS NOT NULL
ORDER BY 2
"""

_WRITERS = f"""
SELECT DISTINCT {_NAME}
FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN {_SESSIONS} AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND n.nspname = 'public' AND c.relname = ANY ($1::text[]) AND a.application_name NOT LIKE 'fastworker%'
"""

# The worker's own role need not read that table.
_MAY_READ_CURSOR = "SELECT has_table_privilege('public.firehose_cursor', 'SELECT')"
_OLD_CURSOR = "SELECT cursor FROM public.firehose_cursor WHERE service = 'firehose'"
_PAST = """
SELECT EXISTS (SELECT FROM fastworker.progress WHERE stream = $1 AND seq IS NOT NULL),
       count(*)::int, count(*) FILTER (WHERE avatar_url LIKE '0155%' OR avatar_url LIKE 'b''%')::int,
       (SELECT count(*)::int FROM fastworker.recheck WHERE attempts > 0)
       + (SELECT count(*)::int FROM fastworker.debts WHERE attempts > 0)
       + (SELECT count(*)::int FROM fastworker.accounts WHERE purge_pending AND purge_error IS NOT NULL),
       coalesce((SELECT kind || ' of ' || key || ': ' || error FROM fastworker.recheck WHERE attempts > 0 LIMIT 1),
           (SELECT 'counters of ' || (deltas[1]).post_uri || ': ' || error FROM fastworker.debts
            WHERE attempts > 0 LIMIT 1),
           (SELECT 'removal of ' || did || ': ' || purge_error FROM fastworker.accounts
            WHERE purge_pending AND purge_error IS NOT NULL LIMIT 1)),
       (SELECT count(*)::int FROM fastworker.refused)
FROM (SELECT avatar_url FROM public.users WHERE avatar_url IS NOT NULL LIMIT 1000) AS looked_at
"""

_FACTS = f"""
SELECT current_setting('server_version_num')::int AS version_num,
       split_part(current_setting('server_version'), ' ', 1) AS version,
       current_setting('max_connections')::int AS max_connections,
       current_setting('superuser_reserved_connections')::int AS reserved,
       (SELECT count(*)::int FROM {_SESSIONS} AS s) AS connections,
       (SELECT count(*)::int FROM {_SESSIONS} AS s WHERE application_name LIKE 'fastworker%') AS own_connections,
       pg_is_in_recovery() AS in_recovery,
       current_setting('transaction_read_only') AS read_only,
       current_setting('server_encoding') AS encoding,
       current_user::text AS role,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('fsync') AS fsync,
       current_setting('autovacuum') AS autovacuum,
       COALESCE((SELECT min(NULLIF(l, -1)) FROM (
           SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user
           UNION ALL SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS limits (l)
       ), -1) AS connection_limit,
       COALESCE(has_schema_privilege(to_regnamespace('fastworker')::oid, 'USAGE'), true) AS usage,
       EXTRACT(epoch FROM clock_timestamp()) AS now
"""

# By pg_class, not to_regclass(): that fails where the role may not look into the schema.
_TABLES = """
(SELECT CASE WHEN n.nspname = 'public' THEN '' ELSE n.nspname || '.' END || c.relname AS name, c.oid
 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname IN ('public', 'fastworker') AND c.relkind IN ('r', 'p')) AS tables
"""
_HIDDEN = f"""
SELECT coalesce(array_agg(name ORDER BY name), '{{}}') FROM {_TABLES} WHERE name = ANY($1) AND row_security_active(oid)
"""
_LACKING = f"""
SELECT name, string_agg(right_name, ', ' ORDER BY right_name)
FROM {_TABLES}
JOIN unnest($1::text[], $2::text[]) AS needed (name, right_name) USING (name)
WHERE NOT has_table_privilege(oid, right_name)
GROUP BY name ORDER BY name
"""
