"""One history, several ways to work it off: the tables are the same, byte by byte.

The command itself (`fastworker worker`) with different numbers of processes, pipelines and batch sizes, killed at
different places, over real Redis and PostgreSQL.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from fastworker.law import compare
from fastworker.store.store import Store
from tests.e2e.house import unread
from tests.property.feeding import clear, lawful, settle
from tests.replies import to_add
from tests.rig.histories import random_history, to_recording
from tests.servers import PostgresUnderTest

KEY, GROUP = "firehose:events", "firehose-processors"
# processes, pipelines in each, COUNT of a read, where to die, kills of whole workers
WAYS: tuple[tuple[int, int, int, str | None, int], ...] = (
    (1, 1, 5_000, None, 0),
    (2, 2, 10, "after_main_commit:7", 0),
    (3, 1, 100, None, 1),
    (2, 1, 1, None, 0),
    (1, 4, 300, "after_tombstone_commit:5", 0),
    (2, 3, 50, "before_main_commit:9", 1),
    (4, 1, 1_000, "after_look_back:11", 0),
    (2, 2, 500, "in_recheck:1", 1),
    (1, 2, 20, "before_ack:13", 3),
    (2, 4, 2_000, "in_account_deletion:2", 0),
)


async def work_off(redis: Redis, redis_url: str, url: str, way: tuple[Any, ...], limit_s: float) -> None:
    """Until every entry is settled, however often a worker dies."""
    processes, pipelines, batch, crashpoint, kills = way
    env = {
        **os.environ,
        "REDIS_URL": redis_url,
        "DATABASE_URL": url,
        "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_PROCESSES": str(processes),
        "PARALLEL_CONSUMERS": str(pipelines),
        "BATCH_SIZE": str(batch),
        "DB_POOL_SIZE": str(processes * pipelines + 1),
        "CONSUMER_ID": f"way-{processes}-{pipelines}",
        "LOG_LEVEL": "ERROR",
    }
    if crashpoint:
        env["FASTWORKER_CRASHPOINT"] = crashpoint
    r = random.Random(repr(way))
    total = await redis.xlen(KEY)

    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fastworker", "worker", env=env, stderr=asyncio.subprocess.DEVNULL
        )

    process = await start()
    try:
        marks = sorted(r.randrange(total // 10, total) for _ in range(kills))
        async with asyncio.timeout(limit_s):
            while True:
                group = (await redis.xinfo_groups(KEY))[0]
                read = total - await unread(redis)
                if read >= total and not group["pending"]:
                    break
                if marks and read >= marks[0]:
                    marks.pop(0)
                    process.send_signal(signal.SIGKILL)  # its children notice and end
                    await process.wait()
                    process = await start()
                if crashpoint and read >= total // 2:
                    env.pop("FASTWORKER_CRASHPOINT", None)
                    crashpoint = None
                    process.send_signal(signal.SIGKILL)
                    await process.wait()
                    process = await start()
                assert process.returncode is None, "the worker ended by itself"
                await asyncio.sleep(0.02)
            process.terminate()
            assert await process.wait() in (0, -signal.SIGTERM)  # the last one may hardly have begun
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def frozen(tables: compare.Tables) -> bytes:
    lines = []
    for name, rows in sorted(tables.items()):
        lines += sorted(f"{name} {json.dumps(row, default=str, sort_keys=True)}" for row in rows)
    return "\n".join(lines).encode()


async def same_tables(
    redis_url: str, postgres_url: str, events: int, ways: tuple[tuple[Any, ...], ...], limit_s: float
) -> None:
    history = random_history(4, events, bare=False)
    expected = lawful(history.events)
    order = list(chain.from_iterable(history.batches))
    first: bytes | None = None
    connection = await asyncpg.connect(postgres_url, timeout=10)
    try:
        async with Redis.from_url(redis_url) as redis:
            for way in ways:
                await clear(connection)
                await redis.flushall()
                await redis.xgroup_create(KEY, GROUP, id="0", mkstream=True)
                for start in range(0, len(order), 2_000):
                    pipe = redis.pipeline(transaction=False)
                    for position in order[start : start + 2_000]:
                        pipe.xadd(KEY, to_add(to_recording(history.events[position])))
                    await pipe.execute()
                await work_off(redis, redis_url, postgres_url, way, limit_s)
                store = await Store.connect(postgres_url)
                await settle(store)
                await store.close()
                found = await compare.dump(connection)
                dump = frozen(found)
                assert compare.report(compare.diff(expected, found)) == "no difference", way
                first = first or dump
                assert dump == first, f"{way} ends with other tables than {ways[0]}"
                assert not await redis.xlen("firehose:dead-letters")
    finally:
        await connection.close(timeout=10)
    assert first is not None
    assert len(first) > 100 * events / 10


async def test_two_ways(redis_url: str, postgres_url: str) -> None:
    await same_tables(redis_url, postgres_url, 400, WAYS[:2], 60)


@pytest.mark.extended
@pytest.mark.timeout(7_200)
async def test_ten_ways_over_two_hundred_thousand_events(server_dir: Path, redis_url: str) -> None:
    from fastworker.store.migrate import migrate

    with PostgresUnderTest(server_dir, durable=False) as server:
        await migrate(server.url)
        await same_tables(redis_url, server.url, int(os.environ.get("WAYS_EVENTS", "200000")), WAYS, 1_500)
