"""Supervisor, monitor, reader and workers at full speed over millions of events: memory, and connections."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import frames_only
from bench.end_to_end import worker
from bench.servers import Servers, command, environment, pss_mb, relay, servers

_CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"


def memory(seed: int, *, events: int, every_s: float = 5.0) -> dict[str, Any]:
    frames_only(seed, events)
    with servers() as running:
        return uvloop.run(_run(running, seed, events, every_s))


async def _run(running: Servers, seed: int, events: int, every_s: float) -> dict[str, Any]:
    """As in production: with their HTTP ports, and handles looked up (at a directory that refuses)."""
    whole = {"FASTWORKER_HTTP_PORT": 0}
    resolve = {"FASTWORKER_RESOLVE_HANDLES": "on", "FASTWORKER_PLC_URL": "http://127.0.0.1:9"}
    curve: list[float] = []
    connections, told, done = 0, time.monotonic(), 0
    connection = await asyncpg.connect(running.postgres.url)
    redis: Any
    async with Redis.from_url(running.redis.url) as redis:
        await redis.set("firehose:python_cursor", "0")
        async with (
            worker(running, **whole, **resolve) as writer,
            relay(frames_only(seed, events), running) as (url, _),
            command(
                "reader", env=environment(running, RELAY_URL=url, FASTWORKER_STREAM_FORMAT="native", **whole)
            ) as reader,
        ):
            began = time.monotonic()
            print(f"  {'s':>5} {'acked':>10} {'worker MB':>10} {'reader MB':>10} {'connections':>12}")
            while done < events * 0.98:
                await asyncio.sleep(0.5)
                connections = max(connections, await connection.fetchval(_CONNECTIONS))
                ledger = {name: int(n) for name, n in (await redis.hgetall("fastworker:ledger")).items()}
                done = sum(n for name, n in ledger.items() if not name.startswith(b"drop:"))
                if (now := time.monotonic()) - told >= every_s:
                    told = now
                    sizes = pss_mb(writer.pid), pss_mb(reader.pid)
                    curve.append(sum(sizes))
                    print(
                        f"  {now - began:>5.0f} {done:>10,} {sizes[0]:>10.1f} {sizes[1]:>10.1f} {connections:>12}",
                        flush=True,
                    )
            seconds = time.monotonic() - began
    await connection.close()
    third = max(1, len(curve) // 3)
    return {
        "peak MB (PSS)": max(curve),
        "last third over first third": statistics.median(curve[-third:]) / statistics.median(curve[:third]),
        "connections at most": connections,
        "events/s": done / seconds,
        "events": done,
        "curve MB": ", ".join(f"{size:.0f}" for size in curve),
    }
