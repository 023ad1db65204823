"""Cost with table size: the same events on empty tables and on tables that hold millions of likes already."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import prepare
from bench.end_to_end import drain, end_to_end
from bench.servers import servers

LIKES_PER_POST, LIKES_PER_USER = 10, 100
BYTES_PER_LIKE = 2_500  # on disk, with everything that follows from it, and room for the runs

# Keys as the network's: DIDs are random, TIDs go up with time, so that every index but those by time is hit all over.
# Like i is of post i % posts; a post's likes are of different users, so that no pair is there twice.
_FUNCTIONS = """
CREATE FUNCTION pg_temp.did(n bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    'did:plc:' || substr(translate(md5('user ' || n), '0189', 'wxyz'), 1, 24);
CREATE FUNCTION pg_temp.tid(n bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    '3l' || translate(lpad(to_hex(n * 2400), 11, '0'), '0123456789abcdef', '234567abcdefghij');
CREATE FUNCTION pg_temp.cid(n bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    'bafyrei' || translate(md5('a' || n) || substr(md5('b' || n), 1, 20), '0189', 'wxyz');
CREATE FUNCTION pg_temp.spread(n bigint) RETURNS bigint LANGUAGE sql IMMUTABLE RETURN
    hashint8(n)::bigint & 2147483647;
CREATE FUNCTION pg_temp.author(post bigint, users bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    pg_temp.did(pg_temp.spread(post + 1000000007) % users);
CREATE FUNCTION pg_temp.post(post bigint, users bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    'at://' || pg_temp.author(post, users) || '/app.bsky.feed.post/' || pg_temp.tid(post);
CREATE FUNCTION pg_temp.liker(i bigint, posts bigint, users bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    pg_temp.did((pg_temp.spread(i % posts) + i / posts * 7919) % users);
CREATE FUNCTION pg_temp.like_uri(i bigint, posts bigint, users bigint) RETURNS text LANGUAGE sql IMMUTABLE RETURN
    'at://' || pg_temp.liker(i, posts, users) || '/app.bsky.feed.like/' || pg_temp.tid(i);
"""
_AT = "timestamp '2025-01-01' + i * interval '2.4 milliseconds'"
_FILL = {
    "users": "INSERT INTO users (did, handle) SELECT pg_temp.did(n), 'handle.invalid' "
    "FROM generate_series(0, {users} - 1) AS n",
    "post_aggregations": "INSERT INTO post_aggregations (post_uri, like_count) "
    "SELECT pg_temp.post(p, {users}), {likes} / {posts} + (p < {likes} % {posts})::int "
    "FROM generate_series(0::bigint, {posts} - 1) AS p",
    "likes": "INSERT INTO likes "
    "(uri, user_did, post_uri, subject_cid, created_at, commit_time, commit_seq, commit_rev) "
    "SELECT pg_temp.like_uri(i, {posts}, {users}), pg_temp.liker(i, {posts}, {users}), "
    f"pg_temp.post(i % {{posts}}, {{users}}), pg_temp.cid(i), {_AT}, {_AT}, i::text, pg_temp.tid(i) "
    "FROM generate_series({low}::bigint, {high} - 1) AS i",
    "notifications": "INSERT INTO notifications "
    "(uri, recipient_did, author_did, reason, reason_subject, cid, created_at) "
    "SELECT pg_temp.like_uri(i, {posts}, {users}) || '#notification', pg_temp.author(i % {posts}, {users}), "
    "pg_temp.liker(i, {posts}, {users}), 'like', pg_temp.post(i % {posts}, {users}), pg_temp.cid(i), "
    f"{_AT} FROM generate_series({{low}}::bigint, {{high}} - 1) AS i",
    "post_viewer_states": "INSERT INTO post_viewer_states (post_uri, viewer_did, like_uri) "
    "SELECT pg_temp.post(i % {posts}, {users}), pg_temp.liker(i, {posts}, {users}), "
    "pg_temp.like_uri(i, {posts}, {users}) FROM generate_series({low}::bigint, {high} - 1) AS i",
}
_PIECES = {"likes": 20, "notifications": 20, "post_viewer_states": 20}  # for the progress
_CONSTRAINTS = (
    "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
    "WHERE conrelid = $1::regclass AND contype IN ('p', 'u')"
)
_INDEXES = (
    "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = $1::regclass "
    "AND NOT EXISTS (SELECT 1 FROM pg_constraint AS c WHERE c.conindid = indexrelid)"
)


def growth(seed: int, events: int, runs: int, *, likes: int) -> list[dict[str, Any]]:
    """The figures of each run. On empty tables each has servers of its own; on full ones they follow each other, the
    first right after a checkpoint, when every page that is touched goes to the WAL whole."""
    folders = [prepare(seed + n, events) for n in range(runs)]
    found = []
    if not likes:
        for n, folder in enumerate(folders):
            _say(f"empty tables: run {n + 1} of {runs}")
            found.append(end_to_end(folder, form="native", events=events, settings={}))
        return found
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < likes * BYTES_PER_LIKE:
        raise SystemExit(
            f"{likes:,} likes need about {likes * BYTES_PER_LIKE / 1e9:.0f} GB in {tempfile.gettempdir()}, which has "
            f"{free / 1e9:.0f} GB free: set TMPDIR to a larger disk or give a smaller --rows."
        )
    with servers(preload=lambda url: uvloop.run(preload(url, likes))) as running:
        size = uvloop.run(_ask(running.postgres.url, "SELECT pg_database_size(current_database())"))
        for n, folder in enumerate(folders):
            _say(f"{likes:,} likes there: run {n + 1} of {runs}")
            if n == 0:
                uvloop.run(_ask(running.postgres.url, "CHECKPOINT"))
            else:
                uvloop.run(_flush(running.redis.url))
            figures = uvloop.run(drain(running, folder, "native", events, {}))
            found.append({**figures, "database GB before": size / 1e9})
    return found


async def preload(url: str, likes: int) -> None:
    """So many likes, and what follows from them."""
    began = time.monotonic()
    users, posts = max(1_000, likes // LIKES_PER_USER), max(100, likes // LIKES_PER_POST)

    async def fill(table: str) -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(_FUNCTIONS)
        keep = table == "users"  # small, and another table refers to its key
        constraints = [] if keep else await connection.fetch(_CONSTRAINTS, table)
        indexes = [] if keep else await connection.fetch(_INDEXES, table)
        for name, _ in constraints:
            await connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
        for name, _ in indexes:
            await connection.execute(f"DROP INDEX {name}")
        pieces = _PIECES.get(table, 1)
        for piece in range(pieces):
            low, high = likes * piece // pieces, likes * (piece + 1) // pieces
            await connection.execute(_FILL[table].format(users=users, posts=posts, likes=likes, low=low, high=high))
            if (piece + 1) % 5 == 0:
                _say(f"{table}: {high:,} of {likes:,} rows, {time.monotonic() - began:.0f} s")
        for name, definition in constraints:
            await connection.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}")
        for _, definition in indexes:
            await connection.execute(definition)
        await connection.execute(f"VACUUM (FREEZE, ANALYZE) {table}")
        _say(f"{table}: indexes made, {time.monotonic() - began:.0f} s")
        await connection.close()

    async with asyncio.TaskGroup() as tasks:
        for table in _FILL:
            tasks.create_task(fill(table))


async def _ask(url: str, sql: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def _flush(url: str) -> None:
    async with Redis.from_url(url) as redis:
        await redis.flushall()


def _say(words: str) -> None:
    print(f"... growth: {words}", file=sys.stderr, flush=True)
