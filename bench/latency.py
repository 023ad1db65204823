"""Relay, reader, stream, worker at a steady rate: from the append to the commit, and the CPU that it takes.

The append is the millisecond of the entry's id (so a latency is up to a millisecond too long), the commit is
PostgreSQL's own commit timestamp, which is taken just before the WAL is flushed: `WAL flush ms` is to be added.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import frames_only
from bench.end_to_end import worker
from bench.repairing import Repair, Served, repairing, served
from bench.servers import Servers, command, cpu_s, environment, relay, servers, settled
from fastworker.errors import InvalidEvent
from fastworker.event import Commit
from fastworker.event.entry import decode_entry

STREAM = "firehose:events"
START_S = 6.0  # more than reader and warm-up need: for so long the relay has frames before those that count
WARM_UP_S = 2.0
REPAIR_START_S = 10.0  # until the first account is settled
TABLES = {"post": "posts", "like": "likes", "repost": "reposts", "follow": "follows"}
# A post whose gate came later was changed by it: its xmin is not that of its own event.
_COMMITS = "SELECT uri, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 * 1000 FROM {table}"
_UNCHANGED = " WHERE NOT has_thread_gate AND NOT has_post_gate"


def latency(seed: int, *, rate: int, seconds: float, repaired: int = 0) -> dict[str, Any]:
    """`repaired`: so many accounts are fetched from simulated hosts and settled meanwhile."""
    frames = frames_only(seed, int(rate * (START_S + seconds + (REPAIR_START_S if repaired else 0))))
    with servers() as running:
        if repaired:
            return uvloop.run(_repaired(running, frames, rate, seconds, served(seed + 1, repaired)))
        return uvloop.run(_run(running, frames, rate, seconds, nullcontext()))


async def _repaired(
    running: Servers, frames: Path, rate: int, seconds: float, hosts: AbstractAsyncContextManager[Served]
) -> dict[str, Any]:
    async with hosts as there:
        return await _run(running, frames, rate, seconds, repairing(running, there))


async def _run(
    running: Servers, frames: Path, rate: int, seconds: float, beside: AbstractAsyncContextManager[Repair | None]
) -> dict[str, Any]:
    keep = {"FASTWORKER_KEEP_SECONDS": 86_400}  # finished entries are looked at afterwards
    redis: Any
    async with Redis.from_url(running.redis.url) as redis:
        await redis.xgroup_create(STREAM, "firehose-processors", id="0", mkstream=True)
        await redis.set("firehose:python_cursor", "0")
        async with worker(running, **keep) as writer:
            await asyncio.sleep(2)
            async with relay(frames, running, "--rate", str(rate)) as (url, relay_pid):
                reads = environment(running, RELAY_URL=url, FASTWORKER_STREAM_FORMAT="native", **keep)
                async with command("reader", env=reads) as reader:
                    pids: dict[str, int | None] = {
                        "reader": reader.pid,
                        "worker": writer.pid,
                        "redis": running.redis.pid,
                        "postgres": running.postgres.pid,
                        "relay": relay_pid,
                    }
                    async with asyncio.timeout(60):
                        while not await redis.xlen(STREAM):
                            await asyncio.sleep(0.01)
                    await asyncio.sleep(WARM_UP_S)  # what the relay sent before the reader came is caught up with
                    async with beside as repair:
                        first, began, clock_ms = await redis.xlen(STREAM), time.monotonic(), time.time() * 1e3
                        before = {name: cpu_s(pid) for name, pid in pids.items()}
                        repaired = await repair.so_far() if repair else {}
                        await asyncio.sleep(seconds)
                        now = await repair.so_far() if repair else {}
                        took, appended_count = time.monotonic() - began, await redis.xlen(STREAM) - first
                        cpu = {name: (cpu_s(pid) - before[name]) / took for name, pid in pids.items()}
            await settled(running.redis.url, await redis.xlen(STREAM), limit_s=60)
        appended = await _creates(redis)
    connection = await asyncpg.connect(running.postgres.url)
    figures: dict[str, Any] = {"appended/s": appended_count / took}
    every: list[float] = []
    kinds: dict[str, list[float]] = {}
    for kind, table in TABLES.items():
        rows = await connection.fetch(_COMMITS.format(table=table) + (_UNCHANGED if kind == "post" else ""))
        times = [row[1] - at for row in rows if (at := appended.get(row[0], 0)) >= clock_ms]
        every += times
        if kind in ("post", "like"):
            kinds[kind] = times
    for name, times in {"all": every, **kinds}.items():
        figures |= _quantiles(name, times)
    figures["WAL flush ms"] = await _flush_ms(connection)
    await connection.close()
    figures["reader and worker, share of a core"] = cpu["reader"] + cpu["worker"]
    figures |= {f"{name}/s": (now[name] - repaired[name]) / took for name in now}
    return figures | {f"{name} CPU, share of a core": share for name, share in cpu.items()}


async def _creates(redis: Any) -> dict[str, int]:
    """The milliseconds at which the records that the stream creates were appended, by uri."""
    found: dict[str, int] = {}
    at = "-"
    while entries := await redis.xrange(STREAM, min=at, count=5_000):
        for entry_id, fields in entries:
            try:
                event = decode_entry(fields)
            except InvalidEvent:
                continue
            if isinstance(event, Commit):
                for op in event.ops:
                    if op.action == "create":
                        found[f"at://{event.repo}/{op.collection}/{op.rkey}"] = int(entry_id.partition(b"-")[0])
        at = "(" + entries[-1][0].decode()
    return found


def _quantiles(name: str, times: list[float]) -> dict[str, float]:
    times.sort()
    return {
        f"{name} {label} ms": times[min(len(times) - 1, int(len(times) * share))]
        for share, label in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"), (1.0, "max"))
    }


async def _flush_ms(connection: Any) -> float:
    """What waiting for the WAL adds to a small commit."""
    medians = []
    await connection.execute("CREATE TABLE fastworker.bench_flush (n int)")
    for mode in ("on", "off"):
        await connection.execute(f"SET synchronous_commit = {mode}")
        times = []
        for n in range(100):
            start = time.perf_counter()
            await connection.execute("INSERT INTO fastworker.bench_flush VALUES ($1)", n)
            times.append((time.perf_counter() - start) * 1e3)
        medians.append(statistics.median(times))
    return medians[0] - medians[1]
