"""The whole path on real servers: relay -> reader -> stream -> worker -> PostgreSQL, in one process and one loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any, Literal

from redis.asyncio import Redis

from fastworker.config import Config
from fastworker.process.board import Heartbeats
from fastworker.reader.reader import run_reader
from fastworker.reader.stats import ReaderStats
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import SimFrame
from fastworker.store.store import Store
from fastworker.stream.admin import RedisAdmin
from fastworker.stream.keys import USUAL
from fastworker.worker.worker import work

KEY, GROUP = "firehose:events", "firehose-processors"
Form = Literal["json", "native", "frame"]


class House:
    """One relay, one reader, one worker with two pipelines. Everything is kept on the stream."""

    def __init__(self, redis: Redis, redis_url: str, postgres_url: str) -> None:
        self.redis = redis
        self.redis_url = redis_url
        self.postgres_url = postgres_url
        self.stats = ReaderStats()
        self.slot = Heartbeats(1)[0]
        self.slot.open("worker-0")
        self._task: asyncio.Task[None]

    async def ingest(self, frames: Iterable[SimFrame | bytes], *, form: Form = "json", last_seq: int) -> None:
        """Serve the frames until `last_seq` is on the stream and every entry is settled."""
        async with SimRelay(frames, start="oldest", wait_for_client=True) as relay, self.worker():
            settings = Config(relay_urls=(relay.url,), redis_url=self.redis_url, stream_format=form, keep_s=3_600)
            stop = asyncio.Event()
            reader = asyncio.create_task(run_reader(settings, stop, stats=self.stats))
            try:
                async with asyncio.timeout(90):
                    while (self.stats.last_seq or 0) < last_seq and not reader.done():
                        await asyncio.sleep(0.02)
                    await self.settled()
                stop.set()
                async with asyncio.timeout(60):
                    await reader
            finally:
                reader.cancel()
                await asyncio.wait([reader])

    async def entries(self, entries: Iterable[dict[Any, Any]]) -> None:
        """Straight onto the stream, and until they are settled."""
        async with self.worker():
            pipe = self.redis.pipeline(transaction=False)
            for fields in entries:
                pipe.xadd(KEY, fields)
            await pipe.execute()
            async with asyncio.timeout(90):
                await self.settled()

    @contextlib.asynccontextmanager
    async def worker(self, **settings_: Any) -> AsyncIterator[None]:
        """`settings_`: other than the usual ones."""
        settings = Config(
            redis_url=self.redis_url,
            database_url=self.postgres_url,
            batch_size=300,
            pipelines=2,
            consumer_id="e2e",
            resolve_handles=False,
            **settings_,
        )
        if not await self.redis.exists(KEY):
            await self.redis.xgroup_create(KEY, GROUP, id="0", mkstream=True)
        stopping = asyncio.Event()
        task = asyncio.create_task(work(settings, self.slot, stopping))
        self._task = task
        self.slot.set(ready=0)
        try:
            async with asyncio.timeout(60):
                while not self.slot.get("ready"):
                    await self._alive()
            yield
            stopping.set()
            async with asyncio.timeout(60):
                await task
            await self._pay()
        finally:
            task.cancel()
            await asyncio.wait([task])
        task.result()

    async def _pay(self) -> None:
        store = await Store.connect(self.postgres_url)
        try:
            while await store.maintain(owed_age_s=0):
                pass
        finally:
            await store.close()

    async def settled(self) -> None:
        while sum((await self.ledger()).values()) < await self.redis.xlen(KEY) or await self.pending():
            await self._alive()

    async def _alive(self) -> None:
        await asyncio.sleep(0.02)
        if self._task.done():
            self._task.result()
            raise AssertionError("the worker ended by itself")

    async def ledger(self) -> dict[str, int]:
        """Entries by how they ended; drops of single ops are fields of their own kind."""
        found: Any = await self.redis.hgetall(USUAL.ledger)
        return {name.decode(): int(value) for name, value in found.items() if not name.startswith(b"drop:")}

    async def pending(self) -> int:
        return int((await self.redis.xpending(KEY, GROUP))["pending"])

    async def unread(self) -> int:
        return await unread(self.redis)

    async def letters(self) -> list[dict[str, str]]:
        found: Any = await self.redis.xrange("firehose:dead-letters")
        return [{k.decode(): v.decode(errors="replace") for k, v in fields.items()} for _, fields in found]


async def unread(redis: Redis) -> int:
    """Entries that were not delivered yet. Redis 6.2 does not count them: far from the end the number is an estimate."""
    stream = await RedisAdmin(redis, KEY).stream()
    group = stream.group(GROUP) if stream is not None else None
    assert group is not None
    return group.lag
