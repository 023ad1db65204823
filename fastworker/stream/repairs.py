"""What the syncer and backfills leave and find in Redis."""

from __future__ import annotations

from typing import Final, cast

from fastworker.stream.admin import RedisAdmin
from fastworker.stream.client import translating

KEPT_S: Final = 3_600


async def tell(admin: RedisAdmin, key: str, text: bytes) -> None:
    """`key`: `repair_status` or `history_status` of the stream's keys. Raises StreamUnavailable."""
    async with translating(admin.redis):
        await admin.redis.set(key, text, ex=KEPT_S)


async def told(admin: RedisAdmin, key: str) -> bytes | None:
    """None: nothing within an hour. Raises StreamUnavailable."""
    async with translating(admin.redis):
        return cast("bytes | None", await admin.redis.get(key))


async def cursor_relay(admin: RedisAdmin) -> str | None:
    """The host that the reader's cursor belongs to. Raises StreamUnavailable."""
    async with translating(admin.redis):
        host = cast("bytes | None", await admin.redis.get(admin.keys.relay))
    return None if host is None else host.decode()
