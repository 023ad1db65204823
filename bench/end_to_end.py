"""A full stream, the command itself, until the last ack: throughput, CPU, memory, WAL, share of the floor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import entries
from bench.floor import floor_s
from bench.servers import Servers, cpu_s, fill, pss_mb, servers, settled

WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"


def end_to_end(
    folder: Path,
    *,
    form: str,
    events: int,
    derive: str,
    processes: int = 2,
    pipelines: int = 2,
    batch_size: int = 500,
    floor: bool = True,
) -> dict[str, Any]:
    with servers() as running:
        return uvloop.run(_run(running, folder, form, events, derive, processes, pipelines, batch_size, floor=floor))


@contextlib.asynccontextmanager
async def worker(running: Servers, **settings: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """`fastworker worker` with an operator's environment."""
    env = {
        **os.environ,
        "REDIS_URL": running.redis.url,
        "DATABASE_URL": running.postgres.url,
        "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_RESOLVE_HANDLES": "off",
        "LOG_LEVEL": "WARNING",
        **{name: str(value) for name, value in settings.items()},
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "fastworker", "worker", env=env)
    try:
        yield process
        process.terminate()
        async with asyncio.timeout(60):
            if await process.wait():
                raise RuntimeError(f"the worker ended with exit code {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _run(
    running: Servers,
    folder: Path,
    form: str,
    events: int,
    derive: str,
    processes: int,
    pipelines: int,
    batch: int,
    *,
    floor: bool,
) -> dict[str, Any]:
    total = await fill(running.redis.url, entries(folder, form, events))
    connection = await asyncpg.connect(running.postgres.url)
    wal = await connection.fetchval(WAL)
    before = {"redis": cpu_s(running.redis.pid), "postgres": cpu_s(running.postgres.pid)}
    peak = 0.0
    async with worker(
        running,
        FASTWORKER_PROCESSES=processes,
        PARALLEL_CONSUMERS=pipelines,
        BATCH_SIZE=batch,
        DB_POOL_SIZE=processes * pipelines + 1,
        FASTWORKER_DERIVE=derive,
    ) as process:
        waiting = asyncio.create_task(settled(running.redis.url, total))
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.5)
            peak = max(peak, pss_mb(process.pid))
        began, ended = waiting.result()
        own = cpu_s(process.pid)
        cost = {
            "worker": own,
            "redis": cpu_s(running.redis.pid) - before["redis"],
            "postgres": cpu_s(running.postgres.pid) - before["postgres"],
        }
    seconds = ended - began
    written = await connection.fetchval(WAL) - wal
    # right before fast: what the ledger says, and counters that are counts
    async with Redis.from_url(running.redis.url) as redis:
        ledger = {name.decode(): int(n) for name, n in (await redis.hgetall("fastworker:ledger")).items()}
    finished = sum(n for name, n in ledger.items() if not name.startswith("drop:"))
    if finished != total:
        raise RuntimeError(f"{total} entries, but the ledger says {ledger}")
    drift = await connection.fetchval(
        "SELECT (SELECT sum(like_count) FROM post_aggregations) - (SELECT count(*) FROM likes)"
    )
    if drift:
        raise RuntimeError(f"like counts are off by {drift}")
    await connection.close()
    figures: dict[str, Any] = {
        "events/s": total / seconds,
        **{f"{name} CPU us/event": value / total * 1e6 for name, value in cost.items()},
        "idle share": max(0.0, 1 - sum(cost.values()) / seconds / (os.cpu_count() or 1)),
        "worker memory MB (PSS)": peak,
        "WAL bytes/event": written / total,
    }
    if floor:
        took = await floor_s(running.postgres.url)
        figures["floor events/s"] = total / took
        figures["share of the floor"] = took / seconds
    return figures
