"""The partitions of a stream: how many there are, and whose events are in which.

The reader says how many it appends to; who reads asks. A partition that the reader appends to no longer is read until
it is empty, and stays known: its figures are part of the sums. On a Cluster each has a slot of its own (keys.py).
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple, cast

from redis.asyncio import Redis

from fastworker.stream.client import translating
from fastworker.stream.keys import Keys
from fastworker.stream.limits import PARTITIONS_MAX


class Layout(NamedTuple):
    """`written`: so many partitions the reader appends to, the first ones; `known`: so many it ever appended to."""

    written: int = 1
    known: int = 1


def partition_of(did: str, count: int) -> int:
    """Of `count` partitions the one that has this account's events; the first one has what belongs to nobody."""
    return zlib.crc32(did.encode()) % count if count > 1 and did else 0


def layout_of(told: bytes | None) -> Layout:
    """As it is in Redis; what cannot be understood counts as one."""
    found = re.fullmatch(rb"(\d{1,9}) (\d{1,9})", told or b"")
    written, known = map(int, found.groups()) if found else (1, 1)
    written = max(1, min(written, PARTITIONS_MAX))
    return Layout(written, max(written, min(known, PARTITIONS_MAX)))


async def layout(redis: Redis, stream_key: str) -> Layout:
    """As the reader said it last. Raises StreamUnavailable."""
    async with translating(redis):
        return layout_of(cast("bytes | None", await redis.get(Keys(stream_key).partitions)))


async def declare(redis: Redis, stream_key: str, written: int) -> Layout:
    """The reader's, before it appends to so many: whoever reads the stream finds them."""
    found = await layout(redis, stream_key)
    now = Layout(written, max(written, found.known))
    if now != found:
        async with translating(redis):
            await redis.set(Keys(stream_key).partitions, f"{now.written} {now.known}")
    return now
