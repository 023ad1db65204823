"""What the tests' own databases rest on: a database is given on only as a fresh one would be."""

from __future__ import annotations

import asyncpg
import pytest

from tests.databases import Contents
from tests.runs import usually

DID = "did:plc:" + "a" * 24


async def _rows(pg: asyncpg.Connection) -> dict[str, int]:
    tables = await pg.fetch("SELECT relid::regclass::text FROM pg_stat_user_tables")
    return {row[0]: await pg.fetchval(f"SELECT count(*) FROM {row[0]}") for row in tables}


async def test_rows_go_and_the_templates_stay(postgres_url: str, pg: asyncpg.Connection) -> None:
    before = await _rows(pg)
    assert before["fastworker.migrations"] >= 3
    contents = await Contents.of(postgres_url)
    await pg.execute("INSERT INTO users (did, handle) VALUES ($1, 'a.test')", DID)
    await pg.execute("DELETE FROM fastworker.migrations")
    assert await contents.restore(postgres_url)
    assert pg.is_closed()
    again = await asyncpg.connect(postgres_url)
    assert await _rows(again) == before
    await again.close()


@pytest.mark.parametrize(
    "change",
    usually(
        [
            "ALTER TABLE posts ADD COLUMN x int",
            "ALTER TABLE posts RENAME TO p",
            "DROP INDEX {index}",
            "CREATE TABLE x ()",
            "ALTER TABLE likes SET (fillfactor = 50)",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "GRANT SELECT ON posts TO pg_monitor",
            "ALTER SEQUENCE {sequence} INCREMENT 2",
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET lock_timeout = 1', current_database()); END $$",
        ],
        "ALTER TABLE posts ADD COLUMN x int",
        "DROP INDEX {index}",
        "GRANT SELECT ON posts TO pg_monitor",
        "ALTER SEQUENCE {sequence} INCREMENT 2",
    ),
)
async def test_what_is_more_than_rows_is_seen(change: str, postgres_url: str, pg: asyncpg.Connection) -> None:
    contents = await Contents.of(postgres_url)
    names = [row[0] for row in await pg.fetch("SELECT sequencename FROM pg_sequences")]
    index = await pg.fetchval(
        "SELECT indexname FROM pg_indexes WHERE tablename = 'likes' AND indexname NOT LIKE '%pkey'"
    )
    await pg.execute(change.replace("{sequence}", names[0]).replace("{index}", index))
    assert not await contents.restore(postgres_url)
