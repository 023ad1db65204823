"""The whole path on real servers; see house.py."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from house import House

from fastworker.stream.client import connect


@pytest.fixture
async def house(redis_url: str, postgres_url: str) -> AsyncIterator[House]:
    client = connect(redis_url)
    yield House(client, redis_url, postgres_url)
    await client.aclose()
