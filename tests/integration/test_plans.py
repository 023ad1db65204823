"""How the statements of a flush find their rows: by keys, although they were planned while the tables were empty.

A plan that goes by what many rows share is right, and nobody sees it until the table is large. What is planned depends on
what autovacuum did a moment ago, too, so these are for `--extended`.
"""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from fastworker.store.store import Store
from tests.integration.test_whole_flush import A, B, C, commits, gone, like, post
from tests.property.feeding import batch_of
from tests.rig.histories import Event

pytestmark = pytest.mark.extended

POST = f"at://{B}/app.bsky.feed.post/p"
PAIRS = 20  # of likes that are written twice: the second one is a twin
_READ = (
    "SELECT indexrelname AS name, idx_scan AS scans, idx_tup_read AS entries FROM pg_stat_user_indexes UNION ALL "
    "SELECT schemaname || '.' || relname, seq_scan, seq_tup_read FROM pg_stat_user_tables"
)


async def _counted(pg: asyncpg.Connection) -> dict[str, tuple[int, int]]:
    return {name: (scans, entries) for name, scans, entries in await pg.fetch(_READ)}


async def _read_by(postgres_url: str, pg: asyncpg.Connection, before: list[Event], last: list[Event]) -> dict[str, int]:
    """Entries of each index, and rows of tables without one, that a session reads for its last flush. Those before it,
    one event each, have made its plans."""
    store = await Store.connect(postgres_url, pool_size=1)  # one session, whose plans and figures they are
    try:
        for event in before:
            await store.write(batch_of([event]))
        async with store.connection() as db:
            await db.execute("SELECT pg_stat_force_next_flush()")
        counted = await _counted(pg)
        await store.write(batch_of(last))
    finally:
        await store.close()
    async with asyncio.timeout(30):
        while await pg.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fastworker'"):
            await asyncio.sleep(0.01)
    return {
        name: entries - counted.get(name, (0, 0))[1]
        for name, (scans, entries) in (await _counted(pg)).items()
        if scans > counted.get(name, (0, 0))[0]
    }


@pytest.fixture
async def reads(pg: asyncpg.Connection) -> None:
    if await pg.fetchval("SELECT current_setting('server_version_num')::int") < 150_000:
        pytest.skip("older servers do not tell at once what was read")
    # Nothing is left of what other tests had in this database: not the pages, nor what an ANALYZE found there.
    await pg.execute("TRUNCATE posts, likes, post_aggregations, fastworker.twins, fastworker.gates CASCADE")
    await pg.execute("DELETE FROM pg_statistic WHERE starelid >= 16384")


@pytest.mark.usefixtures("reads")
async def test_an_empty_aggregate_is_not_looked_for_by_its_zeros(postgres_url: str, pg: asyncpg.Connection) -> None:
    await pg.execute(
        "INSERT INTO post_aggregations (post_uri, like_count) SELECT $1 || n, 1 FROM generate_series(1, 300) AS n", POST
    )
    unlike = gone(A, "app.bsky.feed.like/l")
    events = commits(like(A), unlike, like(A), unlike)
    read = await _read_by(postgres_url, pg, events[:-1], events[-1:])
    assert await pg.fetchval("SELECT count(*) FROM post_aggregations") == 300
    assert {name for name in read if name.endswith("_count")} == set()


@pytest.mark.usefixtures("reads")
async def test_a_pair_is_not_looked_for_by_one_half(postgres_url: str, pg: asyncpg.Connection) -> None:
    """A post has millions of likes, which one person has one of."""
    unlike = gone(A, "app.bsky.feed.like/l")
    events = commits(post(B), like(A), like(B), unlike, like(C))
    read = await _read_by(postgres_url, pg, events[:-2], events[-2:])
    assert {name for name in read if name in ("idx_likes_post_uri", "idx_likes_user_did")} == set()


@pytest.mark.usefixtures("reads")
async def test_not_all_twins_are_read(postgres_url: str, pg: asyncpg.Connection) -> None:
    posts = [f"at://{B}/app.bsky.feed.post/p{n}" for n in range(PAIRS)]
    twice = [like(A, uri, f"{rkey}{n}") for n, uri in enumerate(posts) for rkey in "lt"]
    unlike = gone(C, "app.bsky.feed.like/l")
    events = commits(post(B), like(C), unlike, *twice, like(C), unlike)
    read = await _read_by(postgres_url, pg, events[:-1], events[-1:])
    assert await pg.fetchval("SELECT count(*) FROM fastworker.twins") == PAIRS
    assert read.get("twins_pair", 0) + read.get("fastworker.twins", 0) < PAIRS


@pytest.mark.usefixtures("reads")
async def test_not_all_likes_are_read_to_find_a_twin_among_them(postgres_url: str, pg: asyncpg.Connection) -> None:
    likes = [like(A, f"at://{B}/app.bsky.feed.post/p{n}", f"l{n}") for n in range(PAIRS)]
    events = commits(post(B), like(C), like(C, POST, "t"), *likes)
    read = await _read_by(postgres_url, pg, events, events[2:3])
    assert await pg.fetchval("SELECT count(*) FROM fastworker.twins") == 1
    assert read.get("likes_pkey", 0) + read.get("public.likes", 0) < PAIRS


@pytest.mark.usefixtures("reads")
async def test_not_all_gates_are_read(postgres_url: str, pg: asyncpg.Connection) -> None:
    """PostgreSQL 18 reads a whole table for EXISTS among the columns, whatever it is told of such plans."""

    def gate(rkey: str) -> tuple[str, str, dict[str, object]]:
        return B, f"app.bsky.feed.threadgate/{rkey}", {"post": f"at://{B}/app.bsky.feed.post/{rkey}", "allow": []}

    rkeys = [f"p{n}" for n in range(PAIRS)]
    events = commits(*(one for rkey in rkeys for one in (post(B, rkey), gate(rkey))))
    read = await _read_by(postgres_url, pg, events[:-1], events[-1:])
    assert await pg.fetchval("SELECT count(*) FROM posts WHERE has_thread_gate") == PAIRS
    assert read.get("fastworker.gates", 0) < PAIRS
