"""Which server a session is on, and how far it got: what tells a failover, or a server that was restored."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

import asyncpg
import msgspec
from asyncpg.exceptions import (
    FeatureNotSupportedError,
    InsufficientPrivilegeError,
    ObjectNotInPrerequisiteStateError,
    UndefinedFunctionError,
)

from fastworker.errors import StoreUnavailable
from fastworker.store import statements as sql
from fastworker.store.session import Connection, translating

_SERVER: Final = """
SELECT (SELECT system_identifier::text FROM pg_catalog.pg_control_system()),
       ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int,
       pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::bigint,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint
"""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MANAGED: Final = (  # some managed servers do not allow the question
    FeatureNotSupportedError,
    InsufficientPrivilegeError,
    ObjectNotInPrerequisiteStateError,
    UndefinedFunctionError,
)

NewConnection: TypeAlias = "asyncpg.Connection[Any]"
"""One that is not in the pool yet."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """`system` empty: the server does not tell which it is, and only progress can be compared.

    `entry_id`, `seq`: its progress on the stream; empty and None where there is none. `noted_us`: when any of it was
    written last, in microseconds since 1970, by the server's clock. `relay`: the only host whose numbers `seq` can be;
    empty: none was named; `seq` is None where there are several.
    """

    system: str = ""
    timeline: int = 0
    flushed: int = 0  # bytes of log that are on disk
    inserted: int = 0  # bytes of log that end a record
    entry_id: str = ""
    noted_us: int = 0
    seq: int | None = None
    relay: str = ""


async def places_of(connection: Connection | NewConnection, streams: Sequence[str]) -> list[Place]:
    """One for each stream. Raises StoreUnavailable, also of a standby."""
    with translating():
        if await connection.fetchval("SELECT pg_is_in_recovery()"):
            raise StoreUnavailable("PostgreSQL: this server is a standby, which is read-only (SQLSTATE 25006)")
        try:
            told = await connection.fetchrow(_SERVER)
        except _MANAGED:
            told = None
        marks = await connection.fetch(sql.FINISHED, list(streams))
        hosts = [row[0] for row in await connection.fetch("SELECT host FROM fastworker.relays LIMIT 2")]
    system, timeline, flushed, inserted = told or ("", 0, 0, 0)
    newest: dict[str, Any] = {}
    noted_us: dict[str, int] = {}
    for mark in marks:
        at = (mark["stored_at"] - _EPOCH) // timedelta(microseconds=1)
        noted_us[mark["stream"]] = max(at, noted_us.get(mark["stream"], 0))
    for mark in sorted(marks, key=lambda mark: [int(part) for part in mark["entry_id"].split("-")]):
        newest[mark["stream"]] = mark
    return [
        Place(
            system=system,
            timeline=timeline,
            flushed=flushed,
            inserted=inserted,
            entry_id=mark["entry_id"] if mark else "",
            noted_us=noted_us.get(stream, 0),
            seq=mark["seq"] if mark and len(hosts) < 2 else None,
            relay=hosts[0] if len(hosts) == 1 else "",
        )
        for stream, mark in ((stream, newest.get(stream)) for stream in streams)
    ]
