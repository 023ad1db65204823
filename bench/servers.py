"""Real servers as an operator would set them up, and what their processes cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import uvloop
from redis.asyncio import Redis

from bench.corpus import Fields
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.run.migrate import migrate

SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "synchronous_commit": "on",
    "track_commit_timestamp": "on",
}
_TICK = os.sysconf("SC_CLK_TCK")


class Servers(NamedTuple):
    postgres: EmbeddedPostgres
    redis: EmbeddedRedis


@contextlib.contextmanager
def servers(*, schema: bool = True) -> Iterator[Servers]:
    """PostgreSQL (fsync on) and Redis (append-only file, every second), empty."""
    folder = Path(tempfile.mkdtemp(prefix="fw-bench-"))
    folder.chmod(0o755)
    try:
        with (
            EmbeddedPostgres(folder / "postgres", settings=SETTINGS) as postgres,
            EmbeddedRedis(folder / "redis") as redis,
        ):
            if schema:
                uvloop.run(migrate(postgres.url))
            yield Servers(postgres, redis)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                parents.setdefault(int(stat[stat.rfind(")") + 2 :].split()[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += parents.get(found[-1], [])
    return found


def cpu_s(pid: int) -> float:
    """Seconds that a process and those below it, ended children included, have computed."""
    ticks = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{each}/stat").read_text()
            words = stat[stat.rfind(")") + 2 :].split()
            ticks += sum(int(word) for word in words[11:15])
    return ticks / _TICK


def pss_mb(pid: int) -> float:
    """Memory of a process and those below it, shared pages shared."""
    kb = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kb += int(line.split()[1])
    return kb / 1024


async def fill(redis_url: str, entries: Iterable[Fields], *, key: str = "firehose:events") -> int:
    """The entries onto the stream, with the group before the first one."""
    count = 0
    async with Redis.from_url(redis_url) as redis:
        await redis.xgroup_create(key, "firehose-processors", id="0", mkstream=True)
        pipe = redis.pipeline(transaction=False)
        for fields in entries:
            pipe.xadd(key, fields)  # type: ignore[arg-type]
            count += 1
            if count % 1_000 == 0:
                await pipe.execute()
        await pipe.execute()
    return count


async def settled(redis_url: str, total: int, *, limit_s: float = 1_800) -> tuple[float, float]:
    """Loop times of the first entry read and of the last ack."""
    loop = asyncio.get_running_loop()
    began: float | None = None
    async with asyncio.timeout(limit_s), Redis.from_url(redis_url) as redis:
        while True:
            group = (await redis.xinfo_groups("firehose:events"))[0]
            read = group["entries-read"] or 0
            if read and began is None:
                began = loop.time()
            if read >= total and not group["pending"]:
                return began or loop.time(), loop.time()
            await asyncio.sleep(0.02)
