"""The workers' consumer group: created where it is missing, and again where somebody destroyed it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.errors import StreamUnavailable
from fastworker.stream.client import error_code, translating
from fastworker.stream.ids import id_order
from fastworker.stream.keys import Keys


async def unknown() -> str | None:
    return None


class Group:
    def __init__(
        self, redis: Redis, stream_key: str, name: str, last_finished: Callable[[], Awaitable[str | None]]
    ) -> None:
        """`last_finished`: the stream id up to which everything is settled, as PostgreSQL remembers it."""
        self._redis = redis
        self._stream_key = stream_key
        self._name = name
        keys = Keys(stream_key, name)
        self._recreate_lock, self._given = keys.recreate_lock, keys.given
        self._last_finished = last_finished

    @asynccontextmanager
    async def translating(self) -> AsyncIterator[None]:
        """Run with errors translated; where the group is gone, it is created again for the next attempt."""
        async with translating(self._redis):
            try:
                yield
            except ResponseError as error:
                if error_code(error) != "NOGROUP":
                    raise
                await self._recreate()
                raise StreamUnavailable("the consumer group was gone; it is created again") from error

    async def _recreate(self) -> None:
        """One of all workers creates the group again; the others wait for it."""
        if await self._redis.set(self._recreate_lock, "1", nx=True, ex=5):
            await self.ensure()
        else:
            await asyncio.sleep(0.1)

    async def ensure(self) -> None:
        """Create the group, and the stream, if they are missing.

        A new group starts behind what PostgreSQL remembers as settled, if that id belongs to this stream (an
        empty or foreign Redis has lower ids), else at the beginning: never later than what is unfinished.
        """
        try:
            groups = await self._redis.xinfo_groups(self._stream_key)
        except ResponseError as error:
            if error_code(error) not in ("ERR", ""):
                raise
            groups = []  # no such key
        if any(group["name"] == self._name.encode() for group in groups):
            return
        start = "0-0"
        finished = await self._last_finished()
        if finished is not None and await self._redis.exists(self._stream_key):
            info = await self._redis.xinfo_stream(self._stream_key)
            if id_order(finished) <= id_order(info["last-generated-id"].decode()):
                start = finished
        known = "-".join(f"{part:020}" for part in id_order(start))
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xgroup_create(self._stream_key, self._name, id=start, mkstream=True)
            pipe.set(self._given, f"{known} 0 {known}")
            made, _ = await pipe.execute(raise_on_error=False)
        if isinstance(made, ResponseError) and error_code(made) != "BUSYGROUP":
            raise made
