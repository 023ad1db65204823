"""Frames from a local WebSocket into Redis: the two commands, one beside the other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import uvloop
from redis.asyncio import Redis

from bench.servers import Servers, command, cpu_s, environment, relay, servers


def reader(folder: Path, *, form: str, events: int) -> dict[str, Any]:
    with servers(schema=False) as running:
        return uvloop.run(_run(running, folder, form, events))


async def _run(running: Servers, folder: Path, form: str, events: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    async with Redis.from_url(running.redis.url) as redis, relay(folder / "corpus.frames", running) as (url, relay_pid):
        await redis.xgroup_create("firehose:events", "firehose-processors", id="0", mkstream=True)
        await redis.set("firehose:python_cursor", "0")
        env = environment(
            running, RELAY_URL=url, FASTWORKER_STREAM_FORMAT=form, REDIS_MAX_STREAM_LEN=10_000_000, DATABASE_URL=""
        )
        async with command("reader", env=env) as process:
            pids = {"reader": process.pid, "relay": relay_pid, "redis": running.redis.pid}
            async with asyncio.timeout(600):
                while not (first := await redis.xlen("firehose:events")):
                    await asyncio.sleep(0.005)
                began, before = loop.time(), {name: cpu_s(pid) for name, pid in pids.items()}
                while (now := await redis.xlen("firehose:events")) < events * 0.98:  # json has no #sync
                    await asyncio.sleep(0.005)
            seconds = loop.time() - began
            used = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
        memory = int((await redis.info("memory"))["used_memory"])
        length = await redis.xlen("firehose:events")
    return {
        "frames/s": (now - first) / seconds,
        **{f"{name} CPU us/frame": spent / (now - first) * 1e6 for name, spent in used.items()},
        "redis bytes/entry": memory / length,
    }
