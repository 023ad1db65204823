"""How soon the worker works, and how soon it has stopped: `fastworker worker` on a full stream."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import uvloop
from redis.asyncio import Redis

from bench.corpus import entries
from bench.end_to_end import worker
from bench.servers import Servers, fill, first_ack, servers

LOAD_S = 3.0  # under full load before it is told to stop


def life(folder: Path, *, events: int) -> dict[str, Any]:
    with servers() as running:
        return uvloop.run(_run(running, folder, events))


async def _run(running: Servers, folder: Path, events: int) -> dict[str, Any]:
    """From exec to the first ack; from SIGTERM under load to the end, with nothing held any more."""
    await fill(running.redis.url, entries(folder, "native", events))
    redis: Any
    async with Redis.from_url(running.redis.url) as redis:
        began = time.perf_counter()
        async with worker(running) as process:
            await first_ack(redis)
            first = time.perf_counter() - began
            await asyncio.sleep(LOAD_S if events > 50_000 else 0.3)
            left = events - (await redis.xinfo_groups("firehose:events"))[0]["entries-read"]
            told = time.perf_counter()
            process.terminate()
            async with asyncio.timeout(60):
                await process.wait()
            drained = time.perf_counter() - told
        pending = (await redis.xinfo_groups("firehose:events"))[0]["pending"]
    if pending:
        raise RuntimeError(f"{pending} entries were still pending after the end")
    return {"first ack s": first, "drained s": drained, "unread when told to stop": left}
