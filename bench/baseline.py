"""The guide's shape, written in the simplest way: five pipelines, batches of ten, one transaction per event, one
statement per row. To be compared with in the same run."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import entries
from bench.servers import fill, servers
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.table.mapper import map_commit
from fastworker.table.schema import LIKES, POSTS, REPOSTS

KEY, GROUP = "firehose:events", "firehose-processors"
_COUNTER = {LIKES.name: "like_count", REPOSTS.name: "repost_count"}


def baseline(folder: Path, *, events: int) -> dict[str, Any]:
    with servers() as running:
        return uvloop.run(_run(running.redis.url, running.postgres.url, folder, events))


async def _run(redis_url: str, url: str, folder: Path, events: int) -> dict[str, Any]:
    total = await fill(redis_url, entries(folder, "json", events))
    pool = await asyncpg.create_pool(url, min_size=5, max_size=5)
    redis: Any
    async with Redis.from_url(redis_url) as redis:

        async def pipeline(n: int) -> None:
            while found := await redis.xreadgroup(GROUP, f"baseline-{n}", {KEY: ">"}, count=10):
                for entry_id, fields in found[0][1]:
                    event = decode_entry(fields)
                    if isinstance(event, Commit):
                        async with pool.acquire() as connection, connection.transaction():
                            await _commit(connection, event)
                    await redis.xack(KEY, GROUP, entry_id)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for n in range(5):
                tasks.create_task(pipeline(n))
        seconds = time.perf_counter() - start
    await pool.close()
    return {"events/s": total / seconds}


async def _commit(connection: Any, event: Commit) -> None:
    mapped = map_commit(event, 1_790_000_000_000)
    for did in sorted(set(mapped.dids)):
        await connection.execute(
            "INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid') ON CONFLICT DO NOTHING", did
        )
    for change in mapped.changes:
        table, row = change.table, change.row
        if row is None:
            await connection.execute(f"DELETE FROM {table.name} WHERE uri = $1", change.uri)
            continue
        values = ", ".join(f"${n}" for n in range(1, len(row) + 1))
        columns = ", ".join(table.columns)
        await connection.execute(f"INSERT INTO {table.name} ({columns}) VALUES ({values}) ON CONFLICT DO NOTHING", *row)
        if table is POSTS:
            await connection.execute(
                "INSERT INTO post_aggregations (post_uri) VALUES ($1) ON CONFLICT DO NOTHING", row[0]
            )
            await connection.execute(
                "INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at) "
                "VALUES ($1, $1, $2, 'post', $3, $4, $3) ON CONFLICT DO NOTHING",
                row[0],
                row[2],
                row[12],
                row[1],
            )
        elif table.name in _COUNTER:
            column = _COUNTER[table.name]
            await connection.execute(
                f"UPDATE post_aggregations SET {column} = {column} + 1 WHERE post_uri = $1", row[2]
            )
