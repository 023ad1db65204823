"""Events of a history into the real writer, as the pipeline does it, without a stream."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC

import asyncpg

from fastworker.event import Account, Commit, Identity
from fastworker.event.entry import decode_entry
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.store.store import Store
from fastworker.table.batch import Batch
from fastworker.table.dates import moment_of, parse_date
from fastworker.table.mapper import map_commit
from tests.rig.histories import Event, entry_ms, to_entry


def put(batch: Batch, event: Event) -> None:
    """Decode, map, add."""
    decoded = decode_entry(to_entry(event))
    arrived = entry_ms(event)
    if isinstance(decoded, Commit):
        batch.put(map_commit(decoded, arrived))
    elif isinstance(decoded, Identity | Account):
        at = moment_of(parse_date(decoded.time or ""), arrived).replace(tzinfo=UTC)
        (batch.put_identity if isinstance(decoded, Identity) else batch.put_account)(decoded, at)  # type: ignore[arg-type]


def batch_of(events: Iterable[Event]) -> Batch:
    batch = Batch()
    for event in events:
        put(batch, event)
    return batch


async def settle(store: Store) -> None:
    """Everything that committed transactions still owe."""
    while await store.maintain(owed_age_s=0):
        pass


def lawful(events: Iterable[Event]) -> compare.Tables:
    """The tables that the state law demands."""
    model = Model()
    for event in events:
        model.apply(event, entry_ms(event))
    return model.tables()


async def differences(expected: compare.Tables, connection: asyncpg.Connection) -> str:
    """`no difference`, or a report."""
    return compare.report(compare.diff(expected, await compare.dump(connection)))


async def clear(connection: asyncpg.Connection) -> None:
    """Empty every table but those that a migration filled."""
    tables = await connection.fetch(
        "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname IN ('public', 'fastworker') "
        "AND tablename NOT IN ('migrations', 'horizon')"
    )
    # TRUNCATE makes new files for each table and index: a hundred times slower where there are few rows.
    async with connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute(";".join(f"DELETE FROM {row[0]}" for row in tables))
