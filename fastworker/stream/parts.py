"""The partitions of a stream as an operator sees them, one by one. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.stream.client import error_code, translating
from fastworker.stream.cluster import node_of
from fastworker.stream.ids import id_ms, id_order
from fastworker.stream.keys import Keys, has_slots
from fastworker.stream.partitions import Layout, layout

COUNTED_MAX: Final = 100
"""Entries that are fetched to count a small backlog exactly where the server does not know it."""

Fields = dict[bytes, bytes]


class Group(msgspec.Struct, frozen=True):
    """One consumer group. `lag`: entries not delivered to it yet; `lag_is_exact` False: estimated from ids."""

    name: str
    consumers: int
    pending: int
    last_delivered_id: str
    entries_read: int | None
    lag: int
    lag_is_exact: bool
    oldest_pending_id: str | None
    next_id: str | None  # of the first entry not delivered yet

    @property
    def unfinished_id(self) -> str | None:
        """The oldest entry that this group has not finished."""
        return lowest_of(self.oldest_pending_id, self.next_id)


class ConsumerState(msgspec.Struct, frozen=True):
    """`leased`: by a fastworker that is alive; `ours`: leased by one at some time."""

    name: str
    pending: int
    idle_ms: int
    leased: bool
    ours: bool


class Stream(msgspec.Struct, frozen=True):
    """`entries_added`: ever, from Redis 7 on. `bytes` None: not measured.

    `partitions`: by key, where there are several; the other members are then sums, and the lowest and highest ids.
    """

    length: int
    entries_added: int | None
    bytes: int | None
    first_id: str | None
    last_id: str
    groups: tuple[Group, ...]
    partitions: Mapping[str, Stream] = {}

    def group(self, name: str) -> Group | None:
        return next((group for group in self.groups if group.name == name), None)


class Pending(msgspec.Struct, frozen=True):
    entry_id: str
    consumer: str
    idle_ms: int
    deliveries: int
    partition: int = 0


class Part:
    """One partition."""

    def __init__(self, redis: Redis, stream_key: str, number: int) -> None:
        self.keys: Final = Keys(stream_key, partition=number)
        self.key: Final = self.keys.stream
        self.redis: Final = node_of(redis, self.key)
        self._redis = self.redis
        self._stream_key = stream_key
        self._number = number

    async def length(self) -> int:
        async with translating(self._redis):
            return int(await self._redis.xlen(self.key))

    async def kind(self) -> str:
        """Type of the stream's key; `none` when there is none."""
        async with translating(self._redis):
            return text_of(await self._redis.type(self.key))

    async def stream(self, *, measure: bool = False) -> Stream | None:
        """The stream and its groups; None when there is none. `measure` asks for its memory too."""
        async with translating(self._redis):
            try:
                found = await self._redis.xinfo_stream(self.key)
            except ResponseError as error:
                if "no such key" in str(error).lower():
                    return None
                raise
            length = int(found["length"])
            last_id = text_of(found["last-generated-id"])
            first = found.get("first-entry")
            first_id = text_of(first[0]) if first else None
            groups = [
                await self._group(group, length, first_id, last_id)
                for group in await self._redis.xinfo_groups(self.key)
            ]
            size = int(await self._redis.memory_usage(self.key, samples=5) or 0) if measure else None
        return Stream(length, optional(found.get("entries-added")), size, first_id, last_id, tuple(groups))

    async def _group(self, found: dict[str, Any], length: int, first_id: str | None, last_id: str) -> Group:
        name = text_of(found["name"])
        delivered = text_of(found["last-delivered-id"])
        pending = int(found["pending"])
        summary = await self._redis.xpending(self.key, name) if pending else {}
        following = await entries_of(self._redis, self.key, f"({delivered}", 1)
        lag, exact = found.get("lag"), True
        if not following:
            lag = 0
        elif lag is None:
            # Redis 6.2 does not count; newer ones give up after a deletion in the middle.
            ids = await entries_of(self._redis, self.key, f"({delivered}", COUNTED_MAX)
            exact = len(ids) < COUNTED_MAX
            lag = len(ids) if exact else max(len(ids), _share(first_id, delivered, last_id, length))
        return Group(
            name=name,
            consumers=int(found["consumers"]),
            pending=pending,
            last_delivered_id=delivered,
            entries_read=entries_read(found),
            lag=int(lag),
            lag_is_exact=exact,
            oldest_pending_id=text_of(summary["min"]) if summary.get("min") else None,
            next_id=following[0][0] if following else None,
        )

    async def consumers(self, group: str) -> list[ConsumerState]:
        """Everybody in the group, by name; empty when there is no such group."""
        async with translating(self._redis):
            try:
                found = await self._redis.xinfo_consumers(self.key, group)
            except ResponseError as error:
                if error_code(error) == "NOGROUP" or "no such key" in str(error).lower():
                    return []
                raise
            keys = Keys(self._stream_key, group, self._number)
            ours = {text_of(name) for name in await self._redis.smembers(keys.consumers)}
            names = [text_of(one["name"]) for one in found]
            leases = [await self._redis.get(keys.consumer_lease(name)) for name in names]
        consumers = [
            ConsumerState(name, int(one["pending"]), int(one["idle"]), lease is not None, name in ours)
            for name, one, lease in zip(names, found, leases, strict=True)
        ]
        return sorted(consumers, key=lambda consumer: consumer.name)

    async def pending(self, group: str, count: int) -> list[Pending]:
        """The oldest pending entries of the group."""
        async with translating(self._redis):
            try:
                found = await self._redis.xpending_range(self.key, group, "-", "+", count)
            except ResponseError as error:
                if self._number and error_code(error) == "NOGROUP":  # the workers have not come to it yet
                    return []
                raise
        return [
            Pending(
                text_of(one["message_id"]),
                text_of(one["consumer"]),
                int(one["time_since_delivered"]),
                int(one["times_delivered"]),
                self._number,
            )
            for one in found
        ]


class Parts:
    """All partitions of a stream."""

    def __init__(self, redis: Redis, stream_key: str) -> None:
        self._redis = redis
        self._key = stream_key

    async def layout(self) -> Layout:
        return await layout(self._redis, self._key)

    def one(self, number: int) -> Part:
        return Part(self._redis, self._key, number)

    async def every(self) -> list[Part]:
        return [self.one(number) for number in range((await self.layout()).known)]

    async def slots(self) -> list[list[Part]]:
        """Those that have a ledger and dead letters together: all, or on a Cluster each by itself."""
        parts = await self.every()
        return [[part] for part in parts] if has_slots(self._key) else [parts]


async def entries_of(redis: Redis, key: str, start: str, count: int, end: str = "+") -> list[tuple[str, Fields]]:
    found = cast("list[tuple[bytes, Fields]]", await redis.xrange(key, start, end, count=count))
    return [(text_of(entry_id), fields) for entry_id, fields in found]


def lowest_of(*ids: str | None) -> str | None:
    return min((one for one in ids if one is not None), key=id_order, default=None)


def _share(first_id: str | None, delivered: str, last_id: str, length: int) -> int:
    """Entries after `delivered`, as if they had come evenly."""
    if first_id is None:
        return 0
    first, last, at = id_ms(first_id), id_ms(last_id), id_ms(delivered)
    if at <= first:
        return length
    return round(length * (last - at) / (last - first)) if last > first else length


def entries_read(group: dict[str, Any]) -> int | None:
    return 0 if text_of(group["last-delivered-id"]) == "0-0" else optional(group.get("entries-read"))


def optional(value: Any) -> int | None:
    return None if value is None else int(value)


def text_of(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
