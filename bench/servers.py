"""Real servers as an operator would set them up, the commands on them, and what their processes cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import Fields
from fastworker.commands.tune import Extent, tune
from fastworker.config import VARIABLES
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.event import account_of
from fastworker.event.entry import decode_entry
from fastworker.store.migrate import migrate
from fastworker.stream.keys import USUAL, Keys
from fastworker.stream.partitions import partition_of

SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "synchronous_commit": "on",
    "track_commit_timestamp": "on",
}
# For filling tables before a run: nothing of it is measured, and a crash would only mean to begin again.
LOADING = {
    "shared_buffers": "1GB",
    "fsync": "off",
    "synchronous_commit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "16GB",
    "maintenance_work_mem": "1GB",
    "autovacuum": "off",
}
PYTHON = sys.executable  # what runs fastworker
VERSIONS: dict[str, str] = {}  # of the servers that were started
_TICK = os.sysconf("SC_CLK_TCK")


class Servers(NamedTuple):
    postgres: EmbeddedPostgres
    redis: EmbeddedRedis


@contextlib.contextmanager
def servers(
    *,
    schema: bool = True,
    preload: Callable[[str], None] | None = None,
    tuned: Extent | None = None,
    postgres_settings: Mapping[str, str] = SETTINGS,
) -> Iterator[Servers]:
    """PostgreSQL (fsync on) and Redis (append-only file, every second), empty or with what `preload` put there.

    `tuned`: after `migrate --tune=...`.
    """
    folder = Path(tempfile.mkdtemp(prefix="fw-bench-"))
    folder.chmod(0o755)
    try:
        if preload is not None:
            with EmbeddedPostgres(folder / "postgres", settings=LOADING) as postgres:
                uvloop.run(migrate(postgres.url))
                preload(postgres.url)
            os.sync()
        with (
            EmbeddedPostgres(folder / "postgres", settings=postgres_settings) as postgres,
            EmbeddedRedis(folder / "redis") as redis,
        ):
            if schema:
                uvloop.run(migrate(postgres.url))
            if tuned:
                uvloop.run(tune(postgres.url, tuned, lambda _: None))
            if not VERSIONS:
                uvloop.run(_ask_versions(postgres.url, redis.url))
            yield Servers(postgres, redis)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _ask_versions(url: str, redis_url: str) -> None:
    connection = await asyncpg.connect(url)
    VERSIONS["postgresql"] = (await connection.fetchval("SHOW server_version")).split()[0]
    await connection.close()
    async with Redis.from_url(redis_url) as redis:
        info = await redis.info("server")
        name = info.get("server_name", "redis")
        VERSIONS[name] = info.get(f"{name}_version", info["redis_version"])


def environment(running: Servers, **settings: object) -> dict[str, str]:
    """An operator's: none of fastworker's variables but the servers' addresses, what is quiet, and `settings`."""
    ours = {variable.name for variable in VARIABLES}
    return {
        **{name: value for name, value in os.environ.items() if name not in (*ours, "PYTHONDONTWRITEBYTECODE")},
        "REDIS_URL": running.redis.url,
        "DATABASE_URL": running.postgres.url,
        "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_RESOLVE_HANDLES": "off",
        "FASTWORKER_SYNC": "off",
        "LOG_LEVEL": "WARNING",
        **{name: str(value) for name, value in settings.items()},
    }


@contextlib.asynccontextmanager
async def command(*words: str, env: dict[str, str], **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """`fastworker WORDS`, told to stop at the end; it must end well."""
    process = await asyncio.create_subprocess_exec(PYTHON, "-m", "fastworker", *words, env=env, **options)
    try:
        yield process
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(60):
            if await process.wait():
                raise RuntimeError(f"fastworker {words[0]} ended with exit code {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def relay(frames: Path, running: Servers, *options: str) -> AsyncIterator[tuple[str, int]]:
    """A local relay that serves the frames: its RELAY_URL and its process id."""
    words = ("relay", str(frames), "--port", "0", *options)
    async with command(*words, env=environment(running), stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode().strip()
        yield line.partition("=")[2], process.pid


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


def cpu_s(pid: int | None) -> float:
    """Seconds that a process and those below it, ended children included, have computed."""
    assert pid is not None, "it does not run"
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


async def fill(redis_url: str, entries: Iterable[Fields], *, partitions: int = 1) -> int:
    """The entries onto the stream, with the group before the first one."""
    count = 0
    streams = [Keys(partition=number).stream for number in range(partitions)]
    async with Redis.from_url(redis_url) as redis:
        if partitions > 1:
            await redis.set(USUAL.partitions, f"{partitions} {partitions}")
        for stream in streams:
            await redis.xgroup_create(stream, "firehose-processors", id="0", mkstream=True)
        pipe = redis.pipeline(transaction=False)
        for fields in entries:
            number = partition_of(account_of(decode_entry(fields)), partitions) if partitions > 1 else 0
            pipe.xadd(streams[number], fields)  # type: ignore[arg-type]
            count += 1
            if count % 1_000 == 0:
                await pipe.execute()
        await pipe.execute()
    return count


async def first_ack(redis: Any, *, limit_s: float = 60) -> None:
    """Wait until the ledger has an entry."""
    async with asyncio.timeout(limit_s):
        while not await redis.exists("fastworker:ledger"):
            await asyncio.sleep(0.002)


async def settled(redis_url: str, total: int, *, limit_s: float = 1_800, partitions: int = 1) -> tuple[float, float]:
    """Loop times of the first entry read and of the last ack."""
    loop = asyncio.get_running_loop()
    began: float | None = None
    async with asyncio.timeout(limit_s), Redis.from_url(redis_url) as redis:
        while True:
            groups = [(await redis.xinfo_groups(Keys(partition=number).stream))[0] for number in range(partitions)]
            read = sum(group["entries-read"] or 0 for group in groups)
            if read and began is None:
                began = loop.time()
            if read >= total and not any(group["pending"] for group in groups):
                return began or loop.time(), loop.time()
            await asyncio.sleep(0.02)
