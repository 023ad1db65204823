"""What tests ask of services whose Redis is found among several: how far they are, and whether the tables are right."""

from __future__ import annotations

from datetime import timedelta

import asyncpg

from fastworker.errors import StreamUnavailable
from fastworker.simulator.repo import SimFrame
from fastworker.store.store import Store
from fastworker.stream.admin import RedisAdmin
from fastworker.stream.client import connect, translating
from tests.e2e.test_forms_and_mixes import assert_equal, model_of


async def is_done(url: str, stream: str, cursor: str, seq: int) -> bool:
    """Everything up to this seq is on the stream, and settled."""
    if await cursor_at(url, stream, cursor) < seq:
        return False
    client = connect(url, stream_key=stream)
    try:
        async with translating(client):
            found = await RedisAdmin(client, stream).stream()
            return found is not None and [(group.pending, group.lag) for group in found.groups] == [(0, 0)]
    finally:
        await client.aclose()


async def cursor_at(url: str, stream: str, cursor: str) -> int:
    """0 where there is none, and while nobody can say."""
    client = connect(url, stream_key=stream)
    try:
        async with translating(client):
            return int(await client.get(cursor) or 0)
    except StreamUnavailable:
        return 0
    finally:
        await client.aclose()


async def assert_lawful(postgres_url: str, frames: list[SimFrame]) -> None:
    """The tables are what the law makes of these frames, when everything that is owed is paid."""
    store = await Store.connect(postgres_url)
    while await store.maintain(owed_age_s=0, dead_commit=timedelta()):
        pass
    await store.close()
    connection = await asyncpg.connect(postgres_url)
    try:
        await assert_equal(model_of(frames), connection)
    finally:
        await connection.close()
