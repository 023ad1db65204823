"""The worker processes of a group, and which partition each of them reads: who lives, who owns, what waits.

An owner is who should read a partition, so that others need not; nobody relies on there being one at most. It is kept
in Redis by the members themselves: who does not say for a while that it lives has lost what it owned.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, cast

from redis.asyncio import Redis

from fastworker.stream.client import translating
from fastworker.stream.cluster import node_of
from fastworker.stream.keys import Keys, has_slots
from fastworker.stream.partitions import Layout, layout, layout_of
from fastworker.stream.scripts import script
from fastworker.together import together

MEMBER_MS: Final = 5_000
"""A process that gave no sign for so long reads nothing; its partitions are free."""
_LATEST_MS: Final = 253_402_300_799_000  # the last second that Python has a date for


class Look(NamedTuple):
    """`waiting`: by partition, entries not given to the group yet; `unfinished`: those and what is pending."""

    layout: Layout
    members: Sequence[str]
    owners: dict[int, str]
    waiting: Sequence[int]
    unfinished: Sequence[int]

    @property
    def wanted(self) -> list[int]:
        """Partitions that have to be read: those that the reader appends to, and others until they are empty."""
        return [n for n in range(len(self.unfinished)) if n < self.layout.written or self.unfinished[n]]

    @property
    def empty(self) -> list[int]:
        """The others: the reader does not append to them, and nothing of them is left."""
        return [n for n in range(len(self.unfinished)) if n not in self.wanted]


class Appended(NamedTuple):
    """The reader's cursor, and an id below those of all that it does not cover."""

    seq: int
    entry_id: str


class Members:
    """One process among the others. All methods raise StreamUnavailable while Redis cannot serve."""

    def __init__(self, redis: Redis, stream_key: str, group: str) -> None:
        self.token: Final = secrets.token_hex(8)
        self._redis = redis
        self._stream_key = stream_key
        self._group = group
        self._keys = Keys(stream_key, group)
        self._known = 1
        self._look = redis.register_script(script("look"))
        self._take = redis.register_script(script("take"))
        self._leave = redis.register_script(script("leave"))

    async def look(self) -> Look | None:
        """Say that this process lives, and see who else does. None while the stream has one partition."""
        if self._known == 1:
            self._known = (await layout(self._redis, self._stream_key)).known
            if self._known == 1:
                return None
        keys = self._keys
        streams = [self.stream_of(n) for n in range(self._known)]
        # In their own slots the others are asked one by one.
        here = 1 if has_slots(self._stream_key) else self._known
        async with translating(self._redis):
            members, flat, told, *backlogs = await self._look(
                keys=[keys.members, keys.owners, keys.partitions, *streams[:here]],
                args=[self.token, MEMBER_MS, self._group],
            )
        backlogs += await together(*(self._backlog(stream) for stream in streams[here:]))
        found = layout_of(told)
        if found.known > self._known:
            self._known = found.known
            return await self.look()
        pairs = iter(flat)
        return Look(
            layout=found,
            members=sorted(one.decode() for one in members),
            owners={int(number): token.decode() for number, token in zip(pairs, pairs, strict=True)},
            waiting=[waiting for waiting, _ in backlogs],
            unfinished=[unfinished for _, unfinished in backlogs],
        )

    async def _backlog(self, stream: str) -> tuple[int, int]:
        node = node_of(self._redis, stream)
        async with translating(node):
            waiting, unfinished = await node.register_script(script("backlog"))(keys=[stream], args=[self._group])
        return int(waiting), int(unfinished)

    def stream_of(self, partition: int) -> str:
        return Keys(self._stream_key, self._group, partition).stream

    async def time(self) -> datetime:
        """By the server's clock."""
        async with translating(self._redis):
            seconds, micros = await self._redis.time()
        return datetime.fromtimestamp(seconds + micros / 1e6, UTC)

    async def newest(self) -> datetime:
        """Of the newest id of each partition, the latest."""
        at = 0
        for number in range(self._known):
            stream = self.stream_of(number)
            node = node_of(self._redis, stream)
            async with translating(node), node.pipeline(transaction=False) as pipe:
                pipe.xinfo_stream(stream)
                found: list[Any] = await pipe.execute(raise_on_error=False)
            if isinstance(found[0], dict):  # else there is no stream yet
                at = max(at, int(found[0]["last-generated-id"].partition(b"-")[0]))
        return datetime.fromtimestamp(min(at, _LATEST_MS) / 1000, UTC)

    async def cursors(self) -> dict[int, Appended]:
        """By partition up to where everything is on it; without those of which no reader of ours has said so."""
        if not has_slots(self._stream_key):
            found = await self._cursor(0)
            return dict.fromkeys(range(self._known), found) if found is not None else {}
        of_each = [(number, await self._cursor(number)) for number in range(self._known)]
        return {number: found for number, found in of_each if found is not None}

    async def _cursor(self, partition: int) -> Appended | None:
        keys = Keys(self._stream_key, self._group, partition)
        node = node_of(self._redis, keys.stream)
        async with translating(node):
            seconds, micros = await node.time()
            host = cast("bytes | None", await node.get(keys.relay))
            seq = await node.get(keys.cursor_of(host.decode())) if host else None
        if seq is None or not seq.isdigit():
            return None
        return Appended(int(seq), f"{seconds * 1000 + micros // 1000 - 1}-0")

    async def take(self, partitions: Sequence[int]) -> list[int]:
        """Those of them that nobody owned: they are ours."""
        if not partitions:
            return []
        async with translating(self._redis):
            return cast("list[int]", await self._take(keys=[self._keys.owners], args=[self.token, *partitions]))

    async def give(self, partition: int) -> None:
        """Somebody else may read it."""
        await self._part(str(partition))

    async def leave(self) -> None:
        """All that is ours is free for others, at once."""
        if self._known > 1:
            await self._part("")

    async def _part(self, partition: str) -> None:
        async with translating(self._redis):
            await self._leave(keys=[self._keys.members, self._keys.owners], args=[self.token, partition])
