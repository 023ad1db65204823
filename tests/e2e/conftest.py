"""The whole path on real servers; see house.py."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from fastworker.stream.client import connect
from tests.e2e.house import House


@pytest.fixture
async def house(redis_url: str, postgres_url: str) -> AsyncIterator[House]:
    client = connect(redis_url)
    yield House(client, redis_url, postgres_url)
    await client.aclose()
