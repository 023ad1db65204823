"""Servers of the versions under test: the wheels', or what the environment names (scripts/test-matrix sets it).

TEST_POSTGRES_BIN is a `bin` directory with `initdb` and `postgres`, TEST_REDIS_BIN a server's executable.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import asyncpg

from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis

POSTGRES_BIN = os.environ.get("TEST_POSTGRES_BIN") or None
REDIS_BIN = os.environ.get("TEST_REDIS_BIN") or None

PostgresUnderTest = partial(EmbeddedPostgres, binary=POSTGRES_BIN)
RedisUnderTest = partial(EmbeddedRedis, binary=REDIS_BIN)


async def counts_reads(redis: Any) -> bool:
    """Whether the server knows what a group has read (its lag): from Redis 7 on."""
    return int((await redis.info("server"))["redis_version"].partition(".")[0]) >= 7


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection that is gone afterwards, whatever happens: uvloop waits for ever for one that was left."""
    connection = await asyncpg.connect(url, timeout=10)
    try:
        yield connection
    finally:
        connection.terminate()
