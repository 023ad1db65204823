"""The workers' consumer group: created where it is missing, and again where somebody destroyed it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.errors import StoreUnavailable, StreamUnavailable
from fastworker.stream.client import error_code, translating
from fastworker.stream.ids import id_order
from fastworker.stream.keys import Keys


async def unknown() -> str | None:
    return None


class Group:
    def __init__(self, redis: Redis, keys: Keys, name: str, last_finished: Callable[[], Awaitable[str | None]]) -> None:
        """`last_finished`: the stream id up to which everything is settled, as PostgreSQL remembers it."""
        self._redis = redis
        self._stream_key = keys.stream
        self._name = name
        self._keys = keys
        self._last_finished = last_finished

    @asynccontextmanager
    async def translating(self) -> AsyncIterator[None]:
        """Run with errors translated; where the group is gone, it is created again for the next attempt."""
        async with translating(self._redis):
            try:
                yield
            except ResponseError as error:
                if error_code(error) != "NOGROUP" and "no such key" not in str(error):  # nor is its stream there
                    raise
                await self._recreate()
                raise StreamUnavailable("the consumer group was gone; it is created again") from error

    async def _recreate(self) -> None:
        """One of all workers creates the group again; the others wait for it."""
        if await self._redis.set(self._keys.recreate_lock, "1", nx=True, ex=5):
            await self.ensure()
        else:
            await asyncio.sleep(0.1)

    async def ensure(self) -> None:
        """Create the group, and the stream, if they are missing.

        A new group starts behind what PostgreSQL remembers as settled, if that id belongs to this stream (an
        empty or foreign Redis has lower ids), else at the beginning: never later than what is unfinished. Raises
        StreamUnavailable, also while PostgreSQL does not tell.
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
        try:
            finished = await self._last_finished()
        except StoreUnavailable as error:
            raise StreamUnavailable(f"the group is gone, and where it begins is in PostgreSQL: {error}") from error
        if finished is not None and await self._redis.exists(self._stream_key):
            info = await self._redis.xinfo_stream(self._stream_key)
            if id_order(finished) <= id_order(info["last-generated-id"].decode()):
                start = finished
        known = "-".join(f"{part:020}" for part in id_order(start))
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xgroup_create(self._stream_key, self._name, id=start, mkstream=True)
            if start == "0-0":
                pipe.delete(self._keys.given)  # the next look for what was skipped says where the stream begins
            else:
                pipe.set(self._keys.given, f"{known} 0 {known}")
            made, _ = await pipe.execute(raise_on_error=False)
        if isinstance(made, ResponseError) and error_code(made) != "BUSYGROUP":
            raise made

    async def lowest_pending(self, ours: str) -> str | None:
        """As `WorkerStream.lowest_pending`; `ours`: the lowest id that the asker holds, or empty."""
        async with self.translating(), self._redis.pipeline(transaction=True) as pipe:
            pipe.xpending(self._stream_key, self._name)
            pipe.hvals(self._keys.held)
            pipe.xinfo_groups(self._stream_key)
            pipe.exists(self._keys.go_back)
            pipe.get(self._keys.given)
            summary, held, groups, must_go_back, given = await pipe.execute()
        if must_go_back:
            return "0-0"
        found = {lowest.decode() for lowest in (summary["min"], *held) if lowest} | ({ours} - {""})
        for group in groups:
            if group["name"] == self._name.encode():
                ms, n = id_order(group["last-delivered-id"].decode())
                found.add(f"{ms}-{n + 1}")
        if given:
            ms, n = id_order(given.split(b" ")[0].decode())
            found.add(f"{ms}-{n + 1}")
        return min(found, key=id_order, default=None)

    async def is_finished(self) -> bool:
        """Whether all that was ever appended was given to the group, and nobody holds any of it."""
        async with self.translating(), self._redis.pipeline(transaction=True) as pipe:
            pipe.xinfo_stream(self._stream_key)
            pipe.xinfo_groups(self._stream_key)
            pipe.hlen(self._keys.held)
            pipe.exists(self._keys.go_back)
            pipe.get(self._keys.given)
            stream, groups, held, must_go_back, given = await pipe.execute()
        ours = next((group for group in groups if group["name"] == self._name.encode()), None)
        if ours is None or ours["pending"] or held or must_go_back:
            return False
        last = stream["last-generated-id"].decode()
        if given and id_order(given.split(b" ")[0].decode()) < id_order(last):
            return False
        return bool(ours["last-delivered-id"].decode() == last)
