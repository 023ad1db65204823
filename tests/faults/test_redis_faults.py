"""Redis in every bad state, with the whole worker: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from e2e.house import GROUP, KEY, House
from faults.test_postgres_faults import POST, like
from servers import RedisUnderTest

from fastworker.edge.embedded import EmbeddedRedis
from fastworker.edge.redis_client import connect
from fastworker.errors import Unreachable
from fastworker.testing.proxy import Proxy


@pytest.fixture
async def proxy(redis_server: EmbeddedRedis) -> AsyncIterator[Proxy]:
    async with Proxy(str(redis_server.socket_dir / "redis.sock")) as proxy:
        yield proxy


@pytest.fixture
async def house(redis_url: str, postgres_url: str, proxy: Proxy) -> AsyncIterator[House]:
    """The worker goes through the proxy, the test does not."""
    client = connect(redis_url)
    yield House(client, f"redis://127.0.0.1:{proxy.port}", postgres_url)
    await client.aclose()


async def add(house: House, first: int, count: int) -> None:
    pipe = house.redis.pipeline(transaction=False)
    for number in range(first, first + count):
        pipe.xadd(KEY, like(number))
    await pipe.execute()


async def settled(house: House, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        await house.settled()


async def assert_all(house: House, pg: asyncpg.Connection, count: int) -> None:
    assert await house.ledger() == {"committed": count}
    assert await house.letters() == []
    assert await house.pending() == 0
    assert await pg.fetchval("SELECT count(*) FROM likes") == count
    assert await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", POST) == count


async def test_a_connection_reset_at_any_byte(house: House, proxy: Proxy, pg: asyncpg.Connection) -> None:
    """100 cuts, each after a random number of bytes: in requests, in replies, in scripts, in blocking reads."""
    r = random.Random(4)
    async with house.worker():
        for cut in range(100):
            proxy.cut_after = int(10 ** r.uniform(0, 3.5))
            await add(house, 1 + cut * 20, 20)
            await asyncio.sleep(r.uniform(0, 0.1))
        proxy.cut_after = None
        await settled(house)
        assert proxy.connections > 12
    await assert_all(house, pg, 2_000)


async def test_a_failover_to_a_replica(house: House, pg: asyncpg.Connection) -> None:
    async with house.worker():
        await add(house, 1, 2_000)
        await house.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            async with asyncio.timeout(20):
                while "read-only replica" not in house.slot.snapshot().error:
                    await asyncio.sleep(0.01)
        finally:
            await house.redis.execute_command("REPLICAOF", "NO", "ONE")
        await settled(house)
    await assert_all(house, pg, 2_000)


async def test_what_is_on_the_stream_is_worked_off_while_memory_is_out(house: House, pg: asyncpg.Connection) -> None:
    async with house.worker():
        await add(house, 1, 500)
        await house.redis.config_set("maxmemory", "1")
        try:
            await settled(house)
        finally:
            await house.redis.config_set("maxmemory", "0")
    await assert_all(house, pg, 500)


@pytest.mark.parametrize("how", ["every reply is late", "clients are paused", "a hole"])
async def test_a_slow_redis(house: House, proxy: Proxy, pg: asyncpg.Connection, how: str) -> None:
    async with house.worker():
        await add(house, 1, 300)
        if how == "clients are paused":
            await house.redis.execute_command("CLIENT", "PAUSE", "1000", "ALL")
        elif how == "a hole":
            proxy.hold()
            await asyncio.sleep(1.0)
            proxy.release()
        else:
            proxy.delay_s = 0.1
        await add(house, 301, 300)
        await settled(house)
        proxy.delay_s = 0.0
    await assert_all(house, pg, 600)


async def test_a_server_that_loads_its_data(server_dir: Path, postgres_url: str, pg: asyncpg.Connection) -> None:
    server = RedisUnderTest(server_dir, settings={"key-load-delay": "400"})
    server.start()
    client = connect(server.url)
    house = House(client, server.url, postgres_url)
    try:
        async with house.worker():
            await add(house, 1, 3_000)
            async with asyncio.timeout(30):
                while house.slot.get("committed") < 500:
                    await asyncio.sleep(0.01)
            server.kill()
            starting = asyncio.create_task(asyncio.to_thread(server.start))
            async with asyncio.timeout(20):
                while "loading" not in house.slot.snapshot().error:
                    await asyncio.sleep(0.005)
            await starting
            async with asyncio.timeout(40):
                while True:
                    try:
                        await house.settled()
                        break
                    except Exception as error:
                        if "the worker ended" in str(error):
                            raise
                        await asyncio.sleep(0.1)
        await assert_all(house, pg, 3_000)
    finally:
        await client.aclose()
        server.stop()


@pytest.mark.parametrize("command", ["xreadgroup", "evalsha", "xpending"])
async def test_a_user_without_a_permission(
    house: House, proxy: Proxy, redis_url: str, postgres_url: str, command: str
) -> None:
    """At the start, and while it runs: for an operator, so the process ends with a sentence."""
    await house.redis.execute_command("ACL", "SETUSER", "limited", "reset", "on", "nopass", "~*", "&*", "+@all")
    limited = House(house.redis, f"redis://limited:x@127.0.0.1:{proxy.port}", postgres_url)
    try:
        with pytest.raises((Unreachable, ExceptionGroup)) as caught:
            async with limited.worker():
                await house.redis.execute_command("ACL", "SETUSER", "limited", f"-{command}")
                await add(house, 1, 50)
                await settled(limited, 40)
                async with asyncio.timeout(40):
                    while True:
                        await limited._alive()
        assert "lacks a permission" in _text(caught.value)
        with pytest.raises((Unreachable, ExceptionGroup)) as caught:
            async with limited.worker():
                await add(house, 51, 50)
                async with asyncio.timeout(40):
                    while True:
                        await limited._alive()
        assert "lacks a permission" in _text(caught.value)
    finally:
        await house.redis.execute_command("ACL", "DELUSER", "limited")
    if command != "xreadgroup":
        return  # the leases that such a user cannot give back end after 15 s
    async with house.worker():  # as it should be: all is there
        await house.redis.xlen(KEY)
        async with asyncio.timeout(60):
            while await house.unread() or await house.pending():
                await asyncio.sleep(0.05)


def _text(error: BaseException) -> str:
    return str(error) + "".join(map(_text, getattr(error, "exceptions", ())))


async def test_a_stream_trimmed_by_someone_else(house: House, pg: asyncpg.Connection) -> None:
    """Entries that are pending and gone: acked, counted as ghosts, never waited for."""
    await house.redis.xgroup_create(KEY, GROUP, id="0", mkstream=True)
    await add(house, 1, 200)
    await house.redis.xreadgroup(GROUP, "e2e-0", {KEY: ">"}, count=100)
    await house.redis.xtrim(KEY, maxlen=100, approximate=False)
    async with house.worker(), asyncio.timeout(30):
        while await house.pending() or sum((await house.ledger()).values()) < 200:
            await house._alive()
    assert await house.ledger() == {"committed": 100, "ghosts": 100}
    assert await pg.fetchval("SELECT count(*) FROM likes") == 100
