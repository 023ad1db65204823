"""What Redis remembers of the PostgreSQL that takes a stream, and how reader and group go back when that went back.

One script compares and acts, so that of many workers that find it out one does it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import msgspec
from redis.asyncio import Redis

from fastworker.stream.client import translating
from fastworker.stream.keys import Keys
from fastworker.stream.scripts import script


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """`written`: bytes of log that were on disk, up to the end of a record. `noted_us`: when progress was written last,
    as the server says; 0 where a release before this one remembered."""

    system: str = ""
    timeline: int = 0
    written: int = 0
    entry_id: str = ""
    noted_us: int = 0


class Memory(NamedTuple):
    """`known` None: nothing is remembered, or nothing that can be understood."""

    text: bytes
    known: Known | None


class GoBack(msgspec.Struct, frozen=True):
    """`lost`: entries are gone that nobody had settled, and how far they are is to be asked."""

    seq: int | None
    relay: str
    lost: bool = False


class Database:
    """The memory of one group on one partition. All methods raise StreamUnavailable while Redis cannot serve."""

    def __init__(self, redis: Redis, keys: Keys, group: str) -> None:
        self._redis = redis
        self._group = group
        self._keys = [keys.database, keys.stream, keys.ledger, keys.go_back, keys.given, keys.held]
        self._remember = redis.register_script(script("remember"))

    async def look(self) -> Memory:
        async with translating(self._redis):
            text = cast("bytes | None", await self._redis.get(self._keys[0])) or b""
        try:
            return Memory(text, msgspec.json.decode(text, type=Known) if text else None)
        except msgspec.DecodeError:
            return Memory(text, None)

    async def remember(
        self, was: Memory, now: Known, *, back_to: str | None = None, reader: GoBack | None = None
    ) -> int:
        """Negative: somebody else changed it meanwhile. `back_to`: the group goes back behind this entry, and where the
        stream does not reach so far back, the reader as `reader` says; how many finished entries are given again."""
        args: list[Any] = [
            was.text,
            msgspec.json.encode(now),
            self._group,
            back_to or "",
            msgspec.json.encode(reader) if reader is not None else b"",
        ]
        async with translating(self._redis):
            return int(await self._remember(keys=self._keys, args=args))
