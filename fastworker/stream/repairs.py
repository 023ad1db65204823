"""What the syncer and backfills leave and find in Redis."""

from __future__ import annotations

from typing import Final, cast

from fastworker.stream.admin import RedisAdmin
from fastworker.stream.client import translating

KEPT_S: Final = 3_600


async def tell_repairs(admin: RedisAdmin, text: bytes) -> None:
    """Raises StreamUnavailable."""
    async with translating(admin.redis):
        await admin.redis.set(admin.keys.repair_status, text, ex=KEPT_S)


async def repairs_told(admin: RedisAdmin) -> bytes | None:
    """None: nothing within an hour. Raises StreamUnavailable."""
    async with translating(admin.redis):
        return cast("bytes | None", await admin.redis.get(admin.keys.repair_status))


async def tell_history(admin: RedisAdmin, text: bytes) -> None:
    """Raises StreamUnavailable."""
    async with translating(admin.redis):
        await admin.redis.set(admin.keys.history_status, text, ex=KEPT_S)


async def history_told(admin: RedisAdmin) -> bytes | None:
    """None: nothing within an hour. Raises StreamUnavailable."""
    async with translating(admin.redis):
        return cast("bytes | None", await admin.redis.get(admin.keys.history_status))


async def cursor_relay(admin: RedisAdmin) -> str | None:
    """The host that the reader's cursor belongs to. Raises StreamUnavailable."""
    async with translating(admin.redis):
        host = cast("bytes | None", await admin.redis.get(admin.keys.relay))
    return None if host is None else host.decode()
