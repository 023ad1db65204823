"""Who reads a stream beside us."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.stream.client import translating
from fastworker.stream.consumer import FOREIGN_IDLE_MS
from fastworker.stream.keys import Keys


async def other_reader(redis: Redis, stream_key: str, group: str) -> str | None:
    """Another group, or a consumer of `group` that is not a fastworker's, as a sentence; None: nobody.

    A consumer of ours that has just ended counts as another's until it was idle for long. Raises StreamUnavailable.
    """
    keys = Keys(stream_key, group)
    async with translating(redis):
        try:
            groups = [one["name"].decode() for one in await redis.xinfo_groups(keys.stream)]
            if other := next((name for name in groups if name != group), None):
                return f"group {other} reads it, too"
            for one in await redis.xinfo_consumers(keys.stream, group) if groups else ():
                name = one["name"].decode()
                if one["idle"] <= FOREIGN_IDLE_MS and await redis.get(keys.consumer_lease(name)) is None:
                    return f"consumer {name} is not a fastworker's"
        except ResponseError as error:
            if "no such key" not in str(error).lower():
                raise
    return None
