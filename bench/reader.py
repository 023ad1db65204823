"""Frames from a local WebSocket into Redis: the two commands, one beside the other."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import uvloop
from redis.asyncio import Redis

from bench.servers import cpu_s, servers


def reader(folder: Path, *, form: str, events: int) -> dict[str, Any]:
    with servers(schema=False) as running:
        return uvloop.run(_run(running.redis, folder, form, events))


async def _run(server: Any, folder: Path, form: str, events: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    relay = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fastworker", "relay", str(folder / "corpus.frames"), "--port", "0",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    process = None
    try:
        assert relay.stdout is not None
        async with asyncio.timeout(60):
            line = (await relay.stdout.readline()).decode().strip()
        env = {
            **os.environ,
            "RELAY_URL": line.partition("=")[2],
            "REDIS_URL": server.url,
            "FASTWORKER_STREAM_FORMAT": form,
            "REDIS_MAX_STREAM_LEN": "10000000",
            "FASTWORKER_HTTP_PORT": "off",
            "LOG_LEVEL": "WARNING",
        }
        async with Redis.from_url(server.url) as redis:
            await redis.xgroup_create("firehose:events", "firehose-processors", id="0", mkstream=True)
            await redis.set("firehose:python_cursor", "0")
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "fastworker", "reader", env=env)
            began, cpu, length = 0.0, 0.0, 0
            async with asyncio.timeout(600):
                while True:
                    now = await redis.xlen("firehose:events")
                    if now and not began:
                        began, cpu, first = loop.time(), cpu_s(process.pid), now
                    if now >= events * 0.98:
                        break
                    length = now
                    await asyncio.sleep(0.005)
            seconds = loop.time() - began
            used = cpu_s(process.pid) - cpu
            memory = int((await redis.info("memory"))["used_memory"])
        return {
            "frames/s": (now - first) / seconds,
            "reader CPU us/frame": used / (now - first) * 1e6,
            "redis bytes/entry": memory / max(1, length),
        }
    finally:
        for each in (process, relay):
            if each is not None and each.returncode is None:
                each.kill()
                await each.wait()
