"""Stream append to committed, at a steady rate, by PostgreSQL's own commit timestamps; and the CPU that it takes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import entries
from bench.end_to_end import worker
from bench.servers import Servers, cpu_s, servers, settled
from fastworker.event import Commit
from fastworker.event.entry import decode_entry

WARM_UP = 0.2  # share of the run that is not counted


def latency(folder: Path, *, rate: int, seconds: float) -> dict[str, Any]:
    with servers() as running:
        return uvloop.run(_run(running, folder, rate, seconds))


async def _run(running: Servers, folder: Path, rate: int, seconds: float) -> dict[str, Any]:
    total = int(rate * seconds)
    appended: dict[str, float] = {}
    async with Redis.from_url(running.redis.url) as redis:
        await redis.xgroup_create("firehose:events", "firehose-processors", id="0", mkstream=True)
        async with worker(running) as process:
            await asyncio.sleep(2)
            own, redis_cpu, postgres = (cpu_s(p) for p in (process.pid, running.redis.pid, running.postgres.pid))
            began = time.monotonic()
            for n, fields in enumerate(entries(folder, "native", total)):
                due = began + n / rate
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                event = decode_entry(fields)
                if isinstance(event, Commit):
                    for op in event.ops:
                        if op.action == "create" and op.collection in ("app.bsky.feed.post", "app.bsky.feed.like"):
                            appended[f"at://{event.repo}/{op.collection}/{op.rkey}"] = time.time()
                await redis.xadd("firehose:events", fields)  # type: ignore[arg-type]
            took = time.monotonic() - began
            await settled(running.redis.url, total, limit_s=60)
            cpu = [
                (cpu_s(pid) - before) / took
                for pid, before in (
                    (process.pid, own),
                    (running.redis.pid, redis_cpu),
                    (running.postgres.pid, postgres),
                )
            ]
    connection = await asyncpg.connect(running.postgres.url)
    figures: dict[str, Any] = {"appended/s": total / took}
    first = sorted(appended.values())[int(len(appended) * WARM_UP)]
    for table, name in (("posts", "post"), ("likes", "like")):
        rows = await connection.fetch(
            f"SELECT uri, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM {table}"
        )
        times = sorted((row[1] - at) * 1e3 for row in rows if (at := appended.get(row[0], 0.0)) >= first)
        for share, label in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"), (1.0, "max")):
            figures[f"{name} {label} ms"] = times[min(len(times) - 1, int(len(times) * share))]
    await connection.close()
    figures |= {"worker CPU, share of a core": cpu[0], "redis CPU": cpu[1], "postgres CPU": cpu[2]}
    return figures
