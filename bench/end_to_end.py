"""A full stream, the command itself, until the last ack: throughput, CPU, memory, WAL, share of the floor."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import entries
from bench.floor import floor_s
from bench.servers import SETTINGS, Servers, command, cpu_s, environment, fill, pss_mb, servers, settled
from fastworker.commands.tune import Extent

HOT = "SELECT n_tup_hot_upd / nullif(n_tup_upd, 0)::float8 FROM pg_stat_user_tables WHERE relname = 'post_aggregations'"
OWES = (
    "SELECT EXISTS (SELECT FROM fastworker.debts) OR EXISTS (SELECT FROM fastworker.notes) "
    "OR EXISTS (SELECT FROM fastworker.recheck)"
)
PAID_LIMIT_S = 120.0
WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"


def end_to_end(
    folder: Path,
    *,
    form: str,
    events: int,
    settings: dict[str, Any],
    baseline: float = 0,
    tuned: Extent | None = None,
    postgres_settings: Mapping[str, str] = SETTINGS,
) -> dict[str, Any]:
    """`settings` are the worker's; what is not among them has the product's default. `baseline`: events/s."""
    with servers(tuned=tuned, postgres_settings=postgres_settings) as running:
        figures = uvloop.run(drain(running, folder, form, events, settings))
        took = uvloop.run(floor_s(running.postgres.url))
        figures["floor events/s"] = figures["events"] / took
        figures["share of the floor"] = figures["events/s"] / figures["floor events/s"]
    if baseline:
        figures["multiple of baseline"] = figures["events/s"] / baseline
    return figures


@contextlib.asynccontextmanager
async def worker(running: Servers, **settings: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """`fastworker worker` with an operator's environment."""
    async with command("worker", env=environment(running, **settings)) as process:
        yield process


async def drain(running: Servers, folder: Path, form: str, events: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Fill the stream, start the worker, wait until all is acked, and check that it is right before it is fast."""
    total = await fill(running.redis.url, entries(folder, form, events))
    connection = await asyncpg.connect(running.postgres.url)
    wal = await connection.fetchval(WAL)
    before = {"redis": cpu_s(running.redis.pid), "postgres": cpu_s(running.postgres.pid)}
    peak = 0.0
    async with worker(running, **settings) as process:
        waiting = asyncio.create_task(settled(running.redis.url, total))
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.5)
            peak = max(peak, pss_mb(process.pid))
        began, ended = waiting.result()
        cost = {
            "worker": cpu_s(process.pid),
            "redis": cpu_s(running.redis.pid) - before["redis"],
            "postgres": cpu_s(running.postgres.pid) - before["postgres"],
        }
        async with asyncio.timeout(PAID_LIMIT_S):  # it ends when nothing is owed
            while await connection.fetchval(OWES):
                await asyncio.sleep(0.05)
    seconds = ended - began
    written = await connection.fetchval(WAL) - wal
    async with Redis.from_url(running.redis.url) as redis:
        await finished(redis, total)
    drift = await connection.fetchval(
        "SELECT (SELECT sum(like_count) FROM post_aggregations) - (SELECT count(*) FROM likes) "
        "+ (SELECT coalesce(sum(d.like_count), 0) FROM fastworker.debts, unnest(deltas) AS d)"
    )
    if drift:
        raise RuntimeError(f"like counts are off by {drift}")
    hot = await connection.fetchval(HOT) or 0.0
    await connection.close()
    return {
        "events/s": total / seconds,
        "events": total,
        **{f"{name} CPU us/event": value / total * 1e6 for name, value in cost.items()},
        "idle share": max(0.0, 1 - sum(cost.values()) / seconds / (os.cpu_count() or 1)),
        "worker memory MB (PSS)": peak,
        "WAL bytes/event": written / total,
        "HOT share of counter updates": hot,
    }


async def finished(redis: Any, total: int) -> None:
    """The ledger has so many entries, or this raises RuntimeError."""
    ledger = {name.decode(): int(n) for name, n in (await redis.hgetall("fastworker:ledger")).items()}
    if sum(n for name, n in ledger.items() if not name.startswith("drop:")) != total:
        raise RuntimeError(f"{total} entries, but the ledger says {ledger}")
